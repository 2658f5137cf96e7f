"""The one rule engine of all conversions: foreign named tensors to our parameter trees and back, one tensor at a time.

Rules are data. Our tree decides: each of its arrays is looked up in the table, so that everything foreign that is then
missing, left over or of another shape is known before the first tensor is read.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree, Shaped

from cv2jax.config import UserError

_HOLE = re.compile(r"(\[\{\w+\}\]|\{\w+\})")
_NUMBER = re.compile(r"(?<=[._/])(0|[1-9]\d*)(?=[./]|$)")  # of a layer, in a name of either side

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One foreign tensor and its place in our tree, for every value of the holes.

    Attributes:
      foreign: name with holes: `layers.{layer}.q_proj.weight`.
      ours: path with the same holes: `blocks[{layer}]/query/kernel`. A hole in brackets is an index: it finds the
        separate trees `blocks_0`, `blocks_1`, … as well as one tree `blocks` stacked on a leading axis. Any other hole
        is (a part of) a name: `mlp/{name}/kernel`.
      axes: how the axes of the foreign tensor become ours: `(h c) d -> d h c`. Parentheses are one foreign axis that is
        several of ours, `1` is a foreign axis of size one that we do not have. Empty: they are the same.
      part: (i, n) where our tensor is only the i-th of n equal parts of the foreign one, cut along its first axis.
      scale: ours = scale · foreign, for weights that we keep in another unit; a power of two, so that nothing rounds.
    """

    foreign: str
    ours: str
    axes: str = ""
    part: tuple[int, int] = (0, 1)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if math.frexp(self.scale)[0] != 0.5:
            raise ValueError(f"rule {self.ours}: scale {self.scale:g} must be a power of two")


@runtime_checkable
class Reader(Protocol):
    """Where foreign tensors come from."""

    @property
    def place(self) -> str:
        """What errors call it."""
        ...

    def names(self) -> Mapping[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of every tensor, read from headers only."""
        ...

    def read(self, name: str, index: Index) -> Shaped[np.ndarray, "..."]:
        """The block `index` (one slice an axis) of a tensor, and no more of the file than that."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignTensor:
    """A tensor to write, made when it is read."""

    shape: Shape
    read: Callable[[], Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Link:
    """One of our tensors, `leaf[index]`, and what is foreign of it."""

    name: str
    index: Shape  # on the leading axes of a stacked array
    layout: "_Layout"


class _Layout:
    """The `axes`, `part` and `scale` of a rule for a tensor of ours of known shape."""

    def __init__(self, rule: Rule, shape: Shape) -> None:
        groups, names = _parse_axes(rule.axes, len(shape))
        if len(names) != len(shape):
            raise ValueError(f"rule {rule.ours} has {len(names)} axes for an array of shape {_show(shape)}")
        self._shape, self.part, self.scale = shape, rule.part[0], rule.scale
        self._groups = [tuple(names.index(name) for name in group) for group in groups]
        self._order = tuple(itertools.chain.from_iterable(self._groups))  # our axes in foreign order
        self._part_shape = tuple(math.prod(shape[a] for a in group) for group in self._groups)
        self.num_parts = rule.part[1]
        first = tuple(n * self.num_parts for n in self._part_shape[:1])
        self.foreign_shape = first + self._part_shape[1:]

    def read(self, reader: Reader, name: str, index: Index) -> Shaped[np.ndarray, "..."]:
        """Our block `index` (slices with start and stop) out of the foreign tensor.

        Of a foreign axis that is several of ours only the first can be cut in the file; the others are cut here.
        """
        block, foreign = list(self._shape), []
        rest = list(index)
        for axis, group in enumerate(self._groups):
            start, stop = 0, 1
            if group:
                inner = math.prod(self._shape[a] for a in group[1:])
                cut = index[group[0]]
                block[group[0]], rest[group[0]] = cut.stop - cut.start, slice(None)
                start, stop = cut.start * inner, cut.stop * inner
            offset = self.part * self._part_shape[0] if axis == 0 else 0
            foreign.append(slice(offset + start, offset + stop))
        values = reader.read(name, tuple(foreign)).reshape([block[a] for a in self._order])
        return values.transpose(np.argsort(self._order).tolist())[tuple(rest)]

    def to_foreign(self, values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Our whole tensor as (a part of) the foreign one."""
        scaled = values if self.scale == 1 else values / np.asarray(self.scale, values.dtype)
        return scaled.transpose(self._order).reshape(self._part_shape)


@functools.cache
def _parse_axes(axes: str, rank: int) -> tuple[list[list[str]], list[str]]:
    """(foreign axes as groups of our axes' names, the names in our order)."""
    if not axes:
        names = [str(axis) for axis in range(rank)]
        return [[name] for name in names], names
    foreign, _, ours = axes.partition("->")
    groups = [(inner or word).split() for inner, word in re.findall(r"\(([^)]*)\)|([^\s()]+)", foreign)]
    groups = [[] if group == ["1"] else group for group in groups]
    names = ours.split()
    if sorted(itertools.chain.from_iterable(groups)) != sorted(set(names)):
        raise ValueError(f"{axes!r}: both sides need the same axes, each once")
    return groups, names


@functools.cache
def _path_pattern(ours: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """(what matches a path of our tree, the names of the holes that are indices)."""
    pieces, indices = [], []
    for piece in _HOLE.split(ours):
        name = piece.strip("[{}]")
        if piece.startswith("[{"):
            indices.append(name)
            pieces.append(rf"(?:_(?P<{name}>\d+))?")
        elif piece.startswith("{"):
            pieces.append(f"(?P<{name}>[^/]+)")
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces)), tuple(indices)


def _links(rules: Sequence[Rule], path: str, shape: Shape) -> list[_Link]:
    """All foreign tensors of an array of our tree; none without a rule. ValueError where the table is wrong."""
    found = [(rule, match) for rule in rules if (match := _path_pattern(rule.ours)[0].fullmatch(path))]
    if len(found) > 1:
        raise ValueError(f"{path}: two rules, {found[0][0].ours} and {found[1][0].ours}")
    links = []
    for rule, match in found:
        holes = match.groupdict()
        stacked = [name for name in _path_pattern(rule.ours)[1] if holes[name] is None]
        layout = _Layout(rule, shape[len(stacked) :])
        for index in itertools.product(*(range(n) for n in shape[: len(stacked)])):
            name = rule.foreign.format(**(holes | dict(zip(stacked, index, strict=True))))
            links.append(_Link(name=name, index=index, layout=layout))
    return links


def _plan(rules: Sequence[Rule], tree: PyTree) -> tuple[dict[str, Any], dict[str, list[_Link]]]:
    """(our arrays by path, the links of each)."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    return leaves, {path: _links(rules, path, tuple(leaf.shape)) for path, leaf in leaves.items()}


def _by_name(plan: Mapping[str, list[_Link]]) -> dict[str, list[tuple[str, _Link]]]:
    """Foreign name → (path, link) of each of its parts in order. ValueError where one part has two places."""
    named: dict[str, list[tuple[str, _Link]]] = collections.defaultdict(list)
    for path, links in plan.items():
        for link in links:
            named[link.name].append((path, link))
    for name, found in named.items():
        found.sort(key=lambda item: item[1].layout.part)
        parts = [link.layout.part for _, link in found]
        if len(set(parts)) != len(parts) or len({link.layout.foreign_shape for _, link in found}) > 1:
            raise ValueError(f"{name}: two places in our tree, {' and '.join(path for path, _ in found)}")
    return named


def load_tree(
    rules: Sequence[Rule], reader: Reader, abstract: PyTree, *, ignored: Sequence[str] = (), on_host: bool = False
) -> PyTree:
    """The parameters that `abstract` describes, read in its dtypes and straight into its shardings.

    Each process reads only the shards that its devices hold, one array at a time, so that beside the parameters no more
    than the shards of one array are in memory.

    Args:
      rules: the table. reader: the foreign tensors.
      abstract: nested dict of arrays or ShapeDtypeStructs; without a sharding an array goes to the default device.
      ignored: regular expressions of the names of foreign tensors that are known and not wanted.
      on_host: whole arrays of numpy, for those who only pass them on; no device is asked for memory.

    Raises: UserError that lists everything missing, left over and of another shape or kind, on both sides (`fold_names`).
    """
    check_tensors(rules, reader, abstract, ignored=ignored)
    leaves, plan = _plan(rules, abstract)
    # The largest first: what reading takes beside an array is then taken while there is little else.
    order = sorted(leaves, key=lambda path: -math.prod(leaves[path].shape))
    read = {path: _load_leaf(leaves[path], plan[path], reader, on_host) for path in order}
    loaded = {path: read[path] for path in leaves}
    return traverse_util.unflatten_dict(loaded, sep="/")


def check_tensors(rules: Sequence[Rule], reader: Reader, abstract: PyTree, *, ignored: Sequence[str] = ()) -> None:
    """What `load_tree` checks before it reads a tensor: UserError for names, shapes and kinds that do not fit."""
    leaves, plan = _plan(rules, abstract)
    _check(plan, leaves, reader, ignored)


def _load_leaf(leaf: Any, links: list[_Link], reader: Reader, on_host: bool) -> jax.Array | np.ndarray:
    shape, dtype, sharding = tuple(leaf.shape), np.dtype(leaf.dtype), getattr(leaf, "sharding", None)
    num_stacked, by_index = len(links[0].index), {link.index: link for link in links}

    @functools.cache  # devices that hold the same shard share one reading
    def block(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        cuts = tuple(slice(start, stop) for start, stop in bounds[num_stacked:])
        values = np.empty([stop - start for start, stop in bounds], dtype)
        for place in np.ndindex(values.shape[:num_stacked]):
            link = by_index[tuple(i + start for i, (start, _) in zip(place, bounds, strict=False))]
            values[place] = link.layout.read(reader, link.name, cuts)
            if link.layout.scale != 1:  # in our dtype, whose range is theirs or wider
                values[place] *= np.asarray(link.layout.scale, dtype)
        return values

    def callback(index: Index | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        return block(tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True)))

    if on_host:
        return callback(None)
    if sharding is None:
        return jnp.asarray(callback(None))
    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)


def foreign_tensors(rules: Sequence[Rule], params: PyTree, place: str) -> dict[str, ForeignTensor]:
    """The way back: every foreign tensor of `params`, in fp32 as ours are, fetched only when it is read.

    Raises UserError, with `place`, that lists the arrays without a rule and the foreign tensors of which a part is missing.
    """
    leaves, plan = _plan(rules, params)
    named = _by_name(plan)
    _report(place, {"have no counterpart": _without_rule(plan), "cannot be made whole": _incomplete(named)})
    return {
        name: ForeignTensor(
            shape=found[0][1].layout.foreign_shape,
            read=functools.partial(_read_ours, [(leaves[path], link) for path, link in found]),
        )
        for name, found in named.items()
    }


def _read_ours(parts: list[tuple[Any, _Link]]) -> np.ndarray:
    pieces = [link.layout.to_foreign(_fetch(leaf, link.index)) for leaf, link in parts]
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _fetch(leaf: Any, index: Shape) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf[index]
    if [device.platform for device in leaf.devices()] == ["cpu"]:
        return np.asarray(leaf)[index]  # its own memory
    # A new array: JAX keeps a host copy with every array that was once fetched, here until the parameters go.
    return np.asarray(_take(leaf, index))


@jax.jit
def _take(leaf: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    return leaf[index]


def _check(plan: Mapping[str, list[_Link]], leaves: Mapping[str, Any], reader: Reader, ignored: Sequence[str]) -> None:
    theirs, named = reader.names(), _by_name(plan)
    unknown = [name for name in theirs if name not in named and not any(re.fullmatch(p, name) for p in ignored)]
    _report(
        reader.place,
        {
            "missing": [name for name in named if name not in theirs],
            "left over": [*unknown, *_incomplete(named)],
            "of another shape": list(_differences(named, theirs, leaves)),
            "of ours without a counterpart": _without_rule(plan),
        },
    )


def _differences(
    named: Mapping[str, list[tuple[str, _Link]]],
    theirs: Mapping[str, tuple[Shape, np.dtype]],
    leaves: Mapping[str, Any],
) -> Iterator[str]:
    for name, found in named.items():
        path, link = found[0]
        shape, dtype = theirs.get(name, (link.layout.foreign_shape, np.dtype(leaves[path].dtype)))
        if tuple(shape) != link.layout.foreign_shape:
            yield f"{name} is {_show(shape)} and must be {_show(link.layout.foreign_shape)}"
        if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(leaves[path].dtype, jnp.floating):
            yield f"{name} is {dtype} and must be like {leaves[path].dtype}"


def _without_rule(plan: Mapping[str, list[_Link]]) -> list[str]:
    return [path for path, links in plan.items() if not links]


def _incomplete(named: Mapping[str, list[tuple[str, _Link]]]) -> list[str]:
    short = [(name, len(found), found[0][1].layout.num_parts) for name, found in named.items()]
    return [f"{name} ({have} of {parts} parts)" for name, have, parts in short if have != parts]


def _report(place: str, problems: Mapping[str, list[str]]) -> None:
    said = []
    for what, names in problems.items():
        if names:
            said.append(f"{len(names)} {what}: {', '.join(fold_names(names))}")
    if said:
        raise UserError(f"{place} does not fit the model: {'; '.join(said)}; take weights of the same model and sizes")


def fold_names(names: Sequence[str]) -> list[str]:
    """All names, those that differ only in their numbers as one: `layers.{0-2,5}.up.weight`.

    Two numbers fold to `{0-1}.{0-2}` only where all six names are there. What follows a space is a remark: only names with
    the same remark fold.
    """
    rows = []  # text, number, text, …
    for whole in dict.fromkeys(names):
        name, space, remark = whole.partition(" ")
        *pieces, last = _NUMBER.split(name)
        rows.append((*pieces, last + space + remark))
    for at in range(max(map(len, rows), default=1) - 2, 0, -2):
        groups: dict[tuple[str, ...], list[str]] = {}  # the others' pieces → their numbers
        for row in rows:
            groups.setdefault((*row[:at], "", *row[at + 1 :]) if len(row) > at else row, []).extend(row[at : at + 1])
        rows = [(*row[:at], _span(found), *row[at + 1 :]) if found else row for row, found in groups.items()]
    return ["".join(row) for row in rows]


def _span(numbers: Sequence[str]) -> str:
    """`{0-2,5}` of 0, 1, 2 and 5 in any order; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    starts = [n for n in values if n - 1 not in values]
    ends = [n for n in values if n + 1 not in values]
    return f"{{{','.join(str(a) if a == b else f'{a}-{b}' for a, b in zip(starts, ends, strict=True))}}}"


def _show(shape: Sequence[int]) -> str:
    return f"[{' '.join(map(str, shape))}]"
