"""Meshes by the names of the machines they are for: one host, a TPU slice, several slices, a number of GPUs."""

import dataclasses
import difflib
import math
import re

from cv2jax.config import MeshConfig, UserError
from cv2jax.parallel.chips import Chip, find_chip

# Slices by their number of chips, as Google Cloud offers them (docs.cloud.google.com/tpu/docs/v5e … v5p).
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SOLID = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
    *((8, 8, 8), (8, 8, 16), (8, 16, 16)),
)
_CORES = {"v4": 2, "v5p": 2}  # whose names count TensorCores, of which a chip has two
_TOPOLOGIES = {"v4": _SOLID, "v5p": _SOLID, "v5e": _FLAT, "v6e": _FLAT}
_HYBRID_CHIPS = 16  # over which hybrid splits parameters: enough for any model here, and one axis of a v5e-256
SMALL_SHARE = 0.25  # of a chip's memory: a state of at most that is kept whole on each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A machine by its name.

    Attributes:
      name: v5e-16, 2xv5e-256, gpu-8 or host. chip: of `chips.py`, "" where any will do.
      shape: chips of a slice along each axis of its interconnect; of GPUs their number; () for a host, whatever it has.
      num_slices: joined by the data-centre network.
    """

    name: str
    chip: str = ""
    shape: tuple[int, ...] = ()
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Of all slices; 0 where any number will do."""
        return math.prod(self.shape) * self.num_slices if self.shape else 0

    @property
    def topology_name(self) -> str:
        """What libtpu calls a slice: v5e:4x4; "" for what is no TPU."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}" if self.chip else ""


def _slice_name(chip: str, shape: tuple[int, ...]) -> str:
    return f"{chip}-{math.prod(shape) * _CORES.get(chip, 1)}"


SLICES = {
    _slice_name(chip, shape): Preset(name=_slice_name(chip, shape), chip=chip, shape=shape)
    for chip, shapes in _TOPOLOGIES.items()
    for shape in shapes
}


def find_preset(name: str, key: str = "mesh.preset") -> Preset:
    """The preset of a name: a slice (v5p-128: 64 chips), several (2xv5e-256), gpu-N or host; UserError for another."""
    if name == "host":
        return Preset(name=name)
    if match := re.fullmatch(r"gpu-([1-9]\d*)", name):
        return Preset(name=name, shape=(int(match[1]),))
    count, _, slice_name = name.rpartition("x") if re.match(r"\d+x", name) else ("1", "", name)
    if slice_name in SLICES and int(count):
        return dataclasses.replace(SLICES[slice_name], name=name, num_slices=int(count))
    close = difflib.get_close_matches(slice_name, [*SLICES, "host", "gpu-8"], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise UserError(
        f"{key}={name} is unknown{hint}; give host, gpu-N, or a slice such as v5e-16, v5p-128, v6e-256 or 2xv5e-256"
    )


def parse_topology(text: str, num_slices: int = 1) -> Preset:
    """The slice of v5e:16x16, or of a preset's name, as a Preset; UserError for one that does not exist."""
    if ":" not in text:
        preset = find_preset(text, "--topology")
        if not preset.chip:
            raise UserError(f"--topology {text}: is no TPU slice, and others cannot be compiled for here; give v5e:4x4")
        return dataclasses.replace(preset, num_slices=preset.num_slices * num_slices) if num_slices > 1 else preset
    chip, _, dims = text.partition(":")
    if chip not in _TOPOLOGIES:
        close = difflib.get_close_matches(chip, list(_TOPOLOGIES), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"--topology {text}: no TPU is called {chip}{hint}; choose one of {', '.join(_TOPOLOGIES)}")
    shape = tuple(int(size) if size.isdecimal() else 0 for size in dims.split("x"))
    known = _TOPOLOGIES[chip]
    if shape not in known:
        offered = ", ".join("x".join(map(str, each)) for each in known)
        raise UserError(f"--topology {text}: there is no such slice of {chip}; choose one of {offered}")
    name = _slice_name(chip, shape)
    return Preset(
        name=f"{num_slices}x{name}" if num_slices > 1 else name, chip=chip, shape=shape, num_slices=num_slices
    )


def chip_of(preset: Preset) -> Chip:
    """The chip of a TPU preset."""
    chip = find_chip(preset.chip)
    assert chip is not None, preset
    return chip


def suggest_rules(state_bytes: int, chip: Chip) -> str:
    """The table for a train state of so many bytes: whole on every chip where that is small beside its memory."""
    return "replicated" if state_bytes <= SMALL_SHARE * chip.hbm_bytes else "hybrid"


def preset_shape(preset: Preset, config: MeshConfig, num_devices: int, host_devices: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor of a preset's mesh, by `config.rules` and `config.tensor`.

    fsdp splits parameters over all chips of a slice, hybrid over 16 of them at most (of GPUs: those of a host), and
    replicated over none; the rest of the chips, and all slices, hold replicas. UserError where tensor does not divide.
    """
    inside = num_devices // preset.num_slices
    if config.rules == "replicated":
        split = 1
    elif config.rules == "fsdp":
        split = inside
    else:
        split = math.gcd(inside, _HYBRID_CHIPS if preset.chip else host_devices)
    if inside % config.tensor or (split > 1 and split % config.tensor):
        raise UserError(
            f"mesh.tensor={config.tensor} does not divide the {max(split, 1)} chips over which mesh.preset={preset.name} with "
            f"mesh.rules={config.rules} splits parameters"
        )
    fsdp = max(split // config.tensor, 1)
    return num_devices // (fsdp * config.tensor), fsdp, config.tensor


def candidate_meshes(preset: Preset, tensors: tuple[int, ...] = (1, 2)) -> list[MeshConfig]:
    """The meshes worth a try on a preset, without those that are the same by another name."""
    found: dict[tuple[int, int, int], MeshConfig] = {}
    for rules in ("hybrid", "fsdp", "replicated"):
        for tensor in tensors if rules != "replicated" else (1,):
            config = MeshConfig(preset=preset.name, rules=rules, tensor=tensor)
            inside = preset.num_chips // preset.num_slices
            if inside % tensor == 0 and (rules == "replicated" or math.gcd(inside, _HYBRID_CHIPS) % tensor == 0):
                found.setdefault(preset_shape(preset, config, preset.num_chips, inside), config)
    return list(found.values())


def mesh_flags(mesh: MeshConfig) -> str:
    """What gives a run this mesh on the command line."""
    usual = MeshConfig()
    names = ("preset", "rules", "data", "fsdp", "tensor")
    changed = [name for name in names if getattr(mesh, name) != getattr(usual, name)]
    return " ".join(f"--set mesh.{name}={getattr(mesh, name)}" for name in changed)
