"""What a device sends in the collectives of an HLO module, over which of its networks, and how long that takes at best."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cv2jax.parallel.chips import Chip
from cv2jax.parallel.hlo_text import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one device sends in a step by the executions of one collective.

    Attributes:
      kind: of KINDS. ici_bytes: to devices of its slice. dcn_bytes: to other slices.
      group: positions, in the mesh's order, of devices that exchange it inside a slice: the first such group.
      count: executions.
    """

    kind: str
    ici_bytes: float
    dcn_bytes: float
    group: tuple[int, ...]
    count: float = 1.0


_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def parse_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Replica groups of an instruction's attributes: lists of device positions, the whole for none.

    As {{0,1},{2,3}}; as [2,2]<=[4] or [2,2]<=[2,2]T(1,0); or along axes of a mesh, mesh['a'=2,'b'=2] {'a'}, whose devices
    may be reordered: mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}. Raises ValueError for another form.
    """
    text = attributes.partition("replica_groups=")[2]
    if not text or text.startswith(("{}", "{{}}")):
        return [list(range(num_devices))]
    if found := re.match(r"\{\{[\d,{} ]*\}\}", text):
        return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", found[0])]
    if found := _IOTA.match(text):
        return _reorder(found[2], found[3]).reshape(-1, _sizes(found[1])[-1]).tolist()
    if found := _MESH.match(text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        names, shape = list(axes), tuple(map(int, axes.values()))
        order = _reorder(found[2], found[3]) if found[2] else np.arange(math.prod(shape))
        along = re.findall(r"'([^']+)'(?!:)", found[4])
        if found[4].count("'") == 2 * len(along) and set(along) <= set(names):
            inner = [names.index(name) for name in along]
            outer = [axis for axis in range(len(names)) if axis not in inner]
            moved = order.reshape(shape).transpose(outer + inner)
            return moved.reshape(-1, math.prod(shape[axis] for axis in inner)).tolist()
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _reorder(sizes: str, permutation: str | None) -> np.ndarray:
    order = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return order.transpose(_sizes(permutation)) if permutation else order


def is_collective(opcode: str) -> str:
    """The kind of a collective's opcode, the start of an asynchronous one too; "" for any other and for its end."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def measure(one: Instruction, operand_bytes: float, slice_of: Sequence[int], kind: str = "") -> Transfer:
    """What a device sends in one execution, as its opcode says or as a `kind`; `slice_of`: the slice of each device.

    Ring algorithms, which send the least: of D bytes over n devices an all-reduce sends 2 D (n-1)/n, a reduce-scatter and
    an all-to-all D (n-1)/n, an all-gather of D each D (n-1). A group over several slices works inside each slice and
    between equal places of the slices: the latter over the data-centre network, on the part that a device is left with.
    """
    kind = kind or is_collective(one.opcode)
    if kind == "collective-permute":
        return _permute(one, operand_bytes, slice_of)
    groups = parse_groups(one.attributes, len(slice_of))
    group = groups[0]
    homes = [slice_of[device] for device in group]
    inside = tuple(device for device, home in zip(group, homes, strict=True) if home == homes[0])
    n, slices = len(inside), len(set(homes))
    keep, far = (n - 1) / n, (slices - 1) / slices
    if kind == "all-gather":
        ici, dcn = operand_bytes * slices * (n - 1), operand_bytes * (slices - 1)
    elif kind == "all-reduce":
        ici, dcn = 2 * operand_bytes * keep, 2 * operand_bytes / n * far
    elif kind == "reduce-scatter":
        ici, dcn = operand_bytes * keep, operand_bytes / n * far
    elif kind == "all-to-all":
        total = n * slices
        ici, dcn = operand_bytes * (n - 1) / total, operand_bytes * (total - n) / total
    else:
        ici, dcn = operand_bytes * (n > 1), operand_bytes / n * (slices > 1)  # a broadcast
    return Transfer(kind=kind, ici_bytes=ici, dcn_bytes=dcn, group=inside)


def _permute(one: Instruction, operand_bytes: float, slice_of: Sequence[int]) -> Transfer:
    text = one.attribute("source_target_pairs")
    pairs = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", text)]
    moves = [(a, b) for a, b in pairs if a != b]
    far = any(slice_of[a] != slice_of[b] for a, b in moves)
    near = any(slice_of[a] == slice_of[b] for a, b in moves)
    group = next(((a, b) for a, b in moves if slice_of[a] == slice_of[b]), ())
    ici, dcn = operand_bytes * near, operand_bytes * far
    return Transfer(kind="collective-permute", ici_bytes=ici, dcn_bytes=dcn, group=group)


def measure_send(one: Instruction, operand_bytes: float, num_slices: int) -> Transfer | None:
    """What a `send` takes to other slices through the host, as the compiler writes the part of a collective between them."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    if one.opcode != "send" or found is None:
        return None
    others = num_slices - 1
    factor = {"ALL_REDUCE": 2 * others / num_slices, "REDUCE_SCATTER": others / num_slices, "ALL_GATHER": others}
    dcn = operand_bytes * factor.get(found[1], 1.0)
    kind = found[1].lower().replace("_", "-")
    return Transfer(kind=kind, ici_bytes=0.0, dcn_bytes=dcn, group=())


def ici_bandwidth(chip: Chip, coords: Sequence[Sequence[int]], shape: Sequence[int]) -> float:
    """Bytes a second that a device can send to a group at these places of a slice of this shape.

    A ring over each axis that the group spans, both ways where the axis closes on itself, one way where it is a line; a
    switch has one link.
    """
    if not chip.torus_axes:
        return chip.link_bandwidth
    places = np.asarray(coords)
    ways = 0
    for axis, size in enumerate(shape):
        if size > 1 and len(np.unique(places[:, axis])) > 1:
            ways += 2 if size % chip.wraps_at == 0 else 1
    return chip.link_bandwidth * max(ways, 1)


def seconds(
    transfers: Sequence[Transfer], chip: Chip, devices: Sequence[Any], shape: Sequence[int]
) -> tuple[float, float]:
    """(inside slices, between them): the least time for a step's transfers, one after the other in each network.

    Args:
      devices: in the mesh's order; those of TPUs know their places (`coords`). shape: chips of a slice along each axis.
    """
    ici = dcn = 0.0
    for one in transfers:
        if one.ici_bytes and one.group:
            coords = [getattr(devices[device], "coords", (0, 0, 0)) for device in one.group]
            ici += one.ici_bytes / ici_bandwidth(chip, coords, shape)
        dcn += one.dcn_bytes / chip.dcn_bandwidth_per_chip
    return ici, dcn
