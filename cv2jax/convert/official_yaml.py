"""`cosyvoice2.yaml` as data: HyperPyYAML's tags become inert, so that nothing is ever imported, built, run or included.

Of its language only `!ref <key.sub>` is followed, and products of such (spec/official.md 1.1 uses no more for sizes).
"""

import dataclasses
import math
import pathlib
import re
import reprlib
from typing import Any

from cv2jax.config import UserError

_REFERENCE = re.compile(r"<([\w.]+)>")
_MAX_DEPTH = 64  # of references and of nesting
_MAX_BYTES = 1 << 20
_MAX_ITEMS, _MAX_FACTORS = 256, 16  # of a list, of a product: a few anchors or references else make billions
_MAX_NUMBER = 1 << 53
_MERGE = "tag:yaml.org,2002:merge"


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

        def flatten_mapping(self, node: Any) -> None:
            """Refuses `<<`, which doubles a table with each line that has it twice."""
            if any(key.tag == _MERGE for key, _ in node.value):
                raise yaml.constructor.ConstructorError(None, None, "merge keys are not read here", node.start_mark)
            super().flatten_mapping(node)

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
        self._found: dict[str, Any] = {}  # keys that were looked up: each reference is followed once

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._find(key) is not None

    def has_table(self, key: str) -> bool:
        """Whether a key has keys of its own."""
        return isinstance(self._find(key), dict)

    def plain(self, key: str) -> Any:
        """What is there, as it is; None where there is nothing."""
        return self._find(key)

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
            small = "smaller " if isinstance(value, int) and not isinstance(value, bool) else ""
            raise UserError(f"{self._path}: {key} is {show_value(value)}; it must be a {small}number")
        return found

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        return _as_integers(self._find(key), f"{self._path}: {key}")

    def rows(self, key: str) -> tuple[tuple[int, ...], ...]:
        """A list of lists of whole numbers."""
        value = self._find(key)
        if not isinstance(value, list) or not 0 < len(value) <= _MAX_ITEMS:
            raise UserError(f"{self._path}: {key} is {show_value(value)}; it must be a list of lists")
        return tuple(_as_integers(row, f"{self._path}: {key}") for row in value)

    def _find(self, key: str, depth: int = 0) -> Any:
        if key not in self._found:
            self._found[key] = self._look_up(key, depth)
        return self._found[key]

    def _look_up(self, key: str, depth: int) -> Any:
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
            raise UserError(f"{self._path}: its references go round in a circle at {show_value(value)}; copy it again")
        if not isinstance(value.value, str):
            return value
        factors = [part.strip() for part in value.value.split("*")]
        if len(factors) > _MAX_FACTORS or not all(_REFERENCE.fullmatch(part) for part in factors):
            return value
        found = [self._find(part[1:-1], depth + 1) for part in factors]
        if len(found) == 1:
            return found[0]
        numbers = [_as_number(one) for one in found]
        product = None if None in numbers else _as_number(math.prod(n for n in numbers if n is not None))
        return value if product is None else product


def _as_number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    is_sane = abs(value) <= _MAX_NUMBER if isinstance(value, int) else math.isfinite(value)
    return value if is_sane else None


def _as_integers(value: Any, place: str) -> tuple[int, ...]:
    is_list = isinstance(value, list) and len(value) <= _MAX_ITEMS
    if not is_list or not all(isinstance(n, int) and _as_number(n) is not None for n in value):
        raise UserError(f"{place} is {show_value(value)}; it must be a list of whole numbers")
    return tuple(value)


class _Short(reprlib.Repr):
    """A `repr` that stays short and quick whatever anchors make of a value."""

    def repr_Tagged(self, value: Tagged, level: int) -> str:  # named so by reprlib
        """A tag and what it stands over."""
        if level <= 0:
            return f"{value.tag} …"
        return f"{value.tag} {value.value[:60] if isinstance(value.value, str) else self.repr1(value.value, level - 1)}"


def show_value(value: Any) -> str:
    """A value of `read_yaml` in a message."""
    if value is None:
        return "missing"
    shown = _Short()
    shown.maxlevel = 2
    text = " ".join(shown.repr(value).split())
    return text if len(text) < 60 else f"{text[:57]}…"
