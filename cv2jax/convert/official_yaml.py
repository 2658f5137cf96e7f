"""`cosyvoice2.yaml` as data: HyperPyYAML's tags become inert, so that nothing is ever imported, built, run or included.

Of its language only `!ref <key.sub>` is followed, and products of such (spec/official.md 1.1 uses no more for sizes).
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

from cv2jax.config import UserError

_REFERENCE = re.compile(r"<([\w.]+)>")
_MAX_DEPTH = 64  # of references and of nesting
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tagged:
    """A value with a tag that is not plain YAML: `!new:module.Class` over a mapping, `!ref` over a text."""

    tag: str  # with its "!"
    value: Any  # dict, list, str or None


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """The file as dictionaries, lists, scalars and `Tagged`; nothing in it is run.

    Raises UserError for no such file, for text that is no YAML and for one that is no table of keys.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{path}: is read with PyYAML: pip install 'cv2jax[official]'") from error

    class Loader(yaml.SafeLoader):
        """Safe YAML; every other tag makes a `Tagged`."""

    def inert(loader: Any, suffix: str, node: Any) -> Tagged:
        del suffix
        tag = node.tag if node.tag.startswith("!") else f"!{node.tag.rpartition(':')[2]}"
        if isinstance(node, yaml.MappingNode):
            return Tagged(tag, loader.construct_mapping(node, deep=True))
        if isinstance(node, yaml.SequenceNode):
            return Tagged(tag, loader.construct_sequence(node, deep=True))
        return Tagged(tag, loader.construct_scalar(node))

    Loader.add_multi_constructor("", inert)  # what no constructor of safe YAML knows
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: is larger than a megabyte, and no model's description is; copy it again")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; copy the whole directory") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: is no YAML ({reason}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no table of keys; copy it again")
    return values


class YamlSizes:
    """Looks sizes up in what `read_yaml` gave, through tags and references; keys are `flow.encoder.output_size`."""

    def __init__(self, values: dict[str, Any], path: pathlib.Path) -> None:
        self._values, self._path = values, path

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._find(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; UserError where there is none, and no default."""
        number = self.number(key, default)
        if number != int(number):
            raise UserError(f"{self._path}: {key} is {number}; it must be a whole number")
        return int(number)

    def number(self, key: str, default: float | int | None = None) -> float | int:
        """A number, also one like 1e-6 that YAML takes for a text; UserError where there is none, and no default."""
        value = self._find(key)
        if value is None and default is not None:
            return default
        found = _as_number(value)
        if found is None:
            raise UserError(f"{self._path}: {key} is {_show(value)}; it must be a number")
        return found

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        return _as_integers(self._find(key), f"{self._path}: {key}")

    def rows(self, key: str) -> tuple[tuple[int, ...], ...]:
        """A list of lists of whole numbers."""
        value = self._find(key)
        if not isinstance(value, list) or not value:
            raise UserError(f"{self._path}: {key} is {_show(value)}; it must be a list of lists")
        return tuple(_as_integers(row, f"{self._path}: {key}") for row in value)

    def _find(self, key: str, depth: int = 0) -> Any:
        found: Any = self._values
        for name in key.split("."):
            found = self._follow(found, depth)
            if not isinstance(found, dict) or name not in found:
                return None
            found = found[name]
        return self._follow(found, depth)

    def _follow(self, value: Any, depth: int) -> Any:
        """The value behind tags and references; a tag that cannot be followed stays."""
        if not isinstance(value, Tagged):
            return value
        if value.tag != "!ref":
            return value.value
        if depth > _MAX_DEPTH:
            raise UserError(f"{self._path}: its references go round in a circle at {value.value!r}; copy it again")
        factors = [part.strip() for part in str(value.value).split("*")]
        if not all(_REFERENCE.fullmatch(part) for part in factors):
            return value
        found = [self._find(part[1:-1], depth + 1) for part in factors]
        if len(found) == 1:
            return found[0]
        numbers = [_as_number(one) for one in found]
        return value if None in numbers else math.prod(n for n in numbers if n is not None)


def _as_number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _as_integers(value: Any, place: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise UserError(f"{place} is {_show(value)}; it must be a list of whole numbers")
    return tuple(value)


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    text = f"{value.tag} {value.value}" if isinstance(value, Tagged) else repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"
