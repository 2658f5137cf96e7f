"""What one device does in an optimised HLO module: FLOPs, bytes of its memory, bytes over its networks.

The compiler's own `cost_analysis()` counts the body of a loop once; here it counts as often as it runs. Memory: what
each instruction that runs by itself reads and writes, tiles padded as they lie there; fusions read and write at their
borders only, and what the compiler placed in vector memory costs nothing. So these are the bytes that must move, once each.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from cv2jax.parallel.collectives import Transfer, is_collective, measure, measure_send
from cv2jax.parallel.flops import RECOMPUTED
from cv2jax.parallel.hlo_text import Buffer, Computation, Instruction, Module, parse_hlo
from cv2jax.parallel.windows import count_taps

_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"))
_FREE |= frozenset(("partition-id", "replica-id", "domain", "add-dependency", "async-update"))
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_NO_PLACE = re.compile(
    r"(jit|jvp|vjp|vmap|transpose|custom_\w+)\b|(while|body|cond|closed_call|checkpoint|rematted_\w+|shard_map|pallas_call)$"
)
_NO_CALLS = frozenset(("AllocateBuffer", "ConcatBitcast"))  # that move nothing
_ALIASES = frozenset(("bitcast", "reshape", "get-tuple-element", "tuple", "copy-done", "optimization-barrier"))


@dataclasses.dataclass
class Cost:
    """Of one device in one run of a module.

    Attributes:
      flops: of products and convolutions, kernels included. recomputed: of these, what rematerialisation does again.
      hbm_bytes: read and written. transfers: of collectives.
      by_place: hbm_bytes by where in the model they are moved. unknown: what was met and could not be counted, as text.
    """

    flops: float = 0.0
    recomputed: float = 0.0
    hbm_bytes: float = 0.0
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    by_place: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Cost", times: float = 1.0) -> None:
        """Adds `times` runs of another."""
        self.flops += other.flops * times
        self.recomputed += other.recomputed * times
        self.hbm_bytes += other.hbm_bytes * times
        for name, value in other.by_place.items():
            self.by_place[name] = self.by_place.get(name, 0.0) + value * times
        self.unknown |= other.unknown
        for one in other.transfers:
            scaled = {
                "ici_bytes": one.ici_bytes * times,
                "dcn_bytes": one.dcn_bytes * times,
                "count": one.count * times,
            }
            self.transfers.append(dataclasses.replace(one, **scaled))

    @property
    def ici_bytes(self) -> float:
        """That the device sends inside its slice."""
        return sum(one.ici_bytes for one in self.transfers)

    @property
    def dcn_bytes(self) -> float:
        """That the device sends to other slices."""
        return sum(one.dcn_bytes for one in self.transfers)


def hlo_cost(
    text: str, *, slice_of: Sequence[int] | None = None, kernels: Mapping[str, tuple[float, float]] | None = None
) -> Cost:
    """The cost of a module by its text.

    Args:
      slice_of: the slice of each device in the mesh's order; None: all in one.
      kernels: `Work.kernels` of the traced function: name of a Pallas kernel → (calls, flops), for kernels whose text
        does not say what a call costs.
    """
    module = parse_hlo(text)
    return _Counter(module, slice_of or [0] * module.num_partitions, kernels or {}).computation(module.entry)


class _Counter:
    """Walks the computations of a module from its entry; each is counted once and remembered."""

    def __init__(self, module: Module, slice_of: Sequence[int], kernels: Mapping[str, tuple[float, float]]) -> None:
        # Over several slices the TPU compiler writes the program of one, with sends to the others.
        self._module, self._slice_of = module, slice_of[: module.num_partitions]
        self._num_slices = len(set(slice_of))
        self._kernels = {name: flops / calls for name, (calls, flops) in kernels.items() if calls}
        self._done: dict[tuple[str, bool], Cost] = {}

    def computation(self, name: str, fused: bool = False) -> Cost:
        """The cost of a computation; inside a fusion nothing but FLOPs and collectives."""
        if (name, fused) not in self._done:
            total, inside = Cost(), self._module.computations[name]
            for one in inside.instructions.values():
                self._add(total, inside, one, fused)
            self._done[name, fused] = total
        return self._done[name, fused]

    def _add(self, total: Cost, inside: Computation, one: Instruction, fused: bool) -> None:
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return
        if opcode == "while":
            total.add(self._loop(inside, one))
            return
        if opcode == "conditional":
            branches = [self.computation(name, fused) for name in one.called]
            total.add(max(branches, key=lambda cost: (cost.flops, cost.hbm_bytes)))
            return
        if opcode in ("call", "async-start"):
            for name in one.called:
                total.add(self.computation(name, fused))
            return
        if opcode == "fusion":
            for name in one.called:
                total.add(self.computation(name, True))
        flops = self._flops(inside, one, total)
        total.flops += flops
        if RECOMPUTED in one.attributes:
            total.recomputed += flops
        if kind := is_collective(opcode):
            # The TPU compiler's reduce-scatter: a fusion of a sum and a slice of it.
            users = inside.users[one.name]
            if kind == "all-reduce" and fused and users and all(user.opcode == "dynamic-slice" for user in users):
                kind = "reduce-scatter"
            total.transfers.append(measure(one, _bytes_read(inside, one, padded=False), self._slice_of, kind))
        elif opcode == "send":
            sent = measure_send(one, _bytes_read(inside, one, padded=False), self._num_slices)
            total.transfers += [sent] if sent else []
        if not fused:
            moved = self._moved(inside, one)
            total.hbm_bytes += moved
            place = _place(one)
            total.by_place[place] = total.by_place.get(place, 0.0) + moved

    def _loop(self, inside: Computation, one: Instruction) -> Cost:
        condition, body = (one.attribute(name).lstrip("%") for name in ("condition", "body"))
        told = one.backend_config.get("known_trip_count", {}).get("n")
        trips = float(told) if told is not None else self._trips(inside, one, self._module.computations[condition])
        total = Cost()
        for name in (condition, body):
            total.add(self.computation(name), 1.0 if trips is None else trips)
        if trips is None:
            total.unknown.add(f"trips of {one.name}")
        return total

    def _trips(self, outside: Computation, loop: Instruction, condition: Computation) -> float | None:
        """From the condition, counter < limit, and the counter's first value; a counter of JAX's grows by 1."""
        sides = [_source(condition, condition.operand(condition.root, index)) for index in (0, 1)]
        if condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes or None in sides:
            return None
        counter, limit = sides
        assert counter is not None
        place, most = re.search(r"index=(\d+)", counter.attributes), _constant(limit)
        if place is None or most is None:
            return None
        start = _source(outside, outside.operand(loop, 0))
        first = _constant(_source(outside, outside.operand(start, int(place[1])))) if start else None
        return float(max(most - (first or 0), 0))

    # ── floating-point operations ────────────────────────────────────────────────────────────────────────────────────
    def _flops(self, inside: Computation, one: Instruction, total: Cost) -> float:
        if one.opcode == "dot":
            return _dot(inside, one)
        if one.opcode == "convolution":
            return _convolution(inside, one)
        if one.opcode == "custom-call":
            return self._kernel(one, total)
        return 0.0

    def _kernel(self, one: Instruction, total: Cost) -> float:
        """Of a Pallas kernel: by its name in the traced function, else what its text says."""
        if "tpu_custom_call" not in one.attribute("custom_call_target"):
            return 0.0
        scope = re.search(r'op_name="([^"]*)"', one.attributes)
        named = f"{one.name} {scope[1] if scope else ''}"
        known = [name for name in self._kernels if name in named]
        if known:
            return self._kernels[max(known, key=len)]
        cost = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', one.attributes)
        if cost is None:
            total.unknown.add(f"flops of {one.name}")
        return float(cost[1]) if cost else 0.0

    # ── bytes of memory ──────────────────────────────────────────────────────────────────────────────────────────────
    def _moved(self, inside: Computation, one: Instruction) -> float:
        if one.opcode == "fusion" and one.called:
            return self._fusion(inside, one, self._module.computations[one.called[0]])
        source = _hbm(operand.buffers) if (operand := inside.operand(one, 0)) else 0.0
        if one.opcode in _SLICES:
            return (_padded(one.buffers) if source else 0.0) + _hbm(one.buffers)
        if one.opcode == "slice-start":  # ((source), slice, …)
            return (one.buffers[1].padded_bytes if source else 0.0) + _hbm(one.buffers[1:2])
        if one.opcode in ("copy-start", "recv"):  # (copy, source, …)
            return source + _hbm(one.buffers[:1])
        if one.opcode == "send":
            return source
        if one.opcode == "dynamic-update-slice":
            update = inside.operand(one, 1)
            return (_hbm(update.buffers) + _padded(update.buffers)) if update and source else 0.0
        if one.opcode == "custom-call" and one.attribute("custom_call_target").strip('"') in _NO_CALLS:
            return 0.0
        # The start of a collective has its operands among its results.
        results = (
            one.buffers[len(one.operands) :] if is_collective(one.opcode) and one.opcode.endswith("-start") else ()
        )
        return _bytes_read(inside, one) + _hbm(results or one.buffers)

    def _fusion(self, outside: Computation, one: Instruction, fused: Computation) -> float:
        """What a fusion reads of each operand, slices of it where it takes but those, and what it writes."""
        moved = 0.0
        for index in range(len(one.operands)):
            operand, parameter = outside.operand(one, index), fused.parameters.get(index)
            if operand is None or parameter is None:
                continue
            if not operand.buffers or not all(buffer.is_in_hbm for buffer in operand.buffers):
                continue
            whole = _hbm(operand.buffers)
            read, is_result = self._read(fused, parameter, whole)
            moved += whole if is_result else min(whole, read)
        return moved + self._written(fused, fused.root, one.buffers)

    def _read(self, fused: Computation, value: Instruction, whole: float) -> tuple[float, bool]:
        """(bytes of `value` that the computation reads, whether it hands it out); `whole` where somebody needs all of it."""
        total, is_result = 0.0, value is fused.root
        for user in fused.users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode in _SLICES and first:
                total += _padded(user.buffers)
            elif user.opcode == "dynamic-update-slice" and first:
                pass  # updated in place: the rest of it is not touched
            elif user.opcode in _ALIASES or (user.opcode == "fusion" and user.called):
                handed = user.opcode in _ALIASES
                for index, name in enumerate(user.operands if user.opcode == "fusion" else ()):
                    inner = self._module.computations[user.called[0]]
                    if name == value.name and index in inner.parameters:
                        read, out = self._read(inner, inner.parameters[index], whole)
                        total, handed = total + read, handed or out
                if handed:
                    read, out = self._read(fused, user, whole)
                    total, is_result = total + read, is_result or out
            else:
                return whole, False
        return total, is_result

    def _written(self, fused: Computation, root: Instruction, results: Sequence[Buffer]) -> float:
        """Bytes that a fusion writes: of a slice that it puts into an array, the slice."""
        if root.opcode == "tuple" and len(root.operands) == len(results):
            parts = zip(root.operands, results, strict=True)
            return sum(self._written(fused, fused.instructions[name], (result,)) for name, result in parts)
        while root.opcode in ("bitcast", "reshape") and root.operands:
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            update = fused.operand(root, 1)
            if update is not None and all(result.is_in_hbm for result in results):
                return _padded(update.buffers)
        if root.opcode == "fusion" and root.called:
            inner = self._module.computations[root.called[0]]
            return self._written(inner, inner.root, results)
        return _hbm(results)


def _place(one: Instruction) -> str:
    """Where in the model an instruction comes from, by its scopes there; else its opcode."""
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    scopes = [scope for scope in found[1].split("/") if scope and not _NO_PLACE.match(scope)] if found else []
    scopes = list(dict.fromkeys(scopes))
    return "/".join(scopes[-3:]) if len(scopes) > 1 else one.opcode


def _source(inside: Computation, one: Instruction | None) -> Instruction | None:
    """Where a value comes from, behind copies of it."""
    while one is not None and one.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        one = inside.operand(one, 0)
    return one


def _constant(one: Instruction | None) -> int | None:
    is_number = one is not None and one.opcode == "constant" and re.fullmatch(r"-?\d+", one.arguments)
    return int(one.arguments) if one is not None and is_number else None


def _hbm(buffers: Sequence[Buffer]) -> float:
    return float(sum(buffer.padded_bytes for buffer in buffers if buffer.is_in_hbm))


def _padded(buffers: Sequence[Buffer]) -> float:
    return float(sum(buffer.padded_bytes for buffer in buffers))


def _bytes_read(inside: Computation, one: Instruction, *, padded: bool = True) -> float:
    """Bytes of an instruction's operands: as they lie in device memory, or of their values wherever they lie."""
    operands = [inside.instructions[name] for name in one.operands if name in inside.instructions]
    if padded:
        return sum((_hbm(operand.buffers) for operand in operands), start=0.0)
    return float(sum(buffer.num_bytes for operand in operands for buffer in operand.buffers))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _dot(inside: Computation, one: Instruction) -> float:
    lhs = inside.operand(one, 0)
    assert lhs is not None, one.name
    flops = 2.0
    for size in one.buffers[0].sizes:
        flops *= size
    for axis in _numbers(one.attribute("lhs_contracting_dims")):
        flops *= lhs.buffers[0].sizes[axis]
    return flops


def _convolution(inside: Computation, one: Instruction) -> float:
    """The TPU compiler writes matrix products as convolutions too: they have no window, or one of their batch axes."""
    lhs, rhs = inside.operand(one, 0), inside.operand(one, 1)
    assert lhs is not None, one.name
    assert rhs is not None, one.name
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None, one.name
    sizes = lhs.buffers[0].sizes, rhs.buffers[0].sizes, one.buffers[0].sizes
    window = dict(part.split("=", 1) for part in one.attribute("window").strip("{}").split() if "=" in part)
    flops = 2.0 * sizes[2][labels[3].index("b")] * sizes[2][labels[3].index("f")] * sizes[1][labels[2].index("i")]
    for axis, label in enumerate(sorted(set(labels[1]) - {"b", "f"})):

        def of(name: str, default: int, axis: int = axis) -> int:
            values = window[name].split("x") if name in window else []
            return int(values[axis].split("_")[0]) if axis < len(values) else default

        flops *= count_taps(
            sizes[0][labels[1].index(label)],
            sizes[2][labels[3].index(label)],
            sizes[1][labels[2].index(label)],
            of("stride", 1),
            of("pad", 0),
            of("lhs_dilate", 1),
            of("rhs_dilate", 1),
        )
    return flops
