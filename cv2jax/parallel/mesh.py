"""The device mesh: axes `data` (replicas), `fsdp` (parameters and batch split) and `tensor` (inside a layer)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cv2jax.config import MeshConfig, UserError
from cv2jax.parallel.chips import find_chip
from cv2jax.parallel.presets import find_preset, preset_shape
from cv2jax.parallel.sharding import RULES, TABLES

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the configured shape over `devices` (default all); raises UserError when it does not divide them.

    Over several slices (TPU pods joined by the data-centre network) the `data` axis is laid across the slices, so that
    only gradient sums leave a slice. A table of rules other than the usual one is a last axis of its name and size 1.
    Raises UserError too for a preset of other devices, and where hybrid rules would split parameters across slices or hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    config.validate()
    shape = _shape(config, devices)
    axes = AXES
    if TABLES[config.rules] is not RULES:
        shape, axes = (*shape, 1), (*AXES, config.rules)
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    kinds = (AxisType.Auto,) * len(axes)  # linen's logical constraints need Auto axes
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise UserError(
                f"mesh.data={shape[0]} does not divide into {len(slices)} slices; make it a multiple of {len(slices)}"
            )
        inside, across = (shape[0] // len(slices), *shape[1:]), (len(slices), *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices, allow_split_physical_axes=True)
        mesh = Mesh(np.asarray(grid), axes, axis_types=kinds)
    else:
        mesh = jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)
    if config.rules == "hybrid":
        _require_inside(mesh)
    return mesh


def _shape(config: MeshConfig, devices: list[jax.Device]) -> tuple[int, ...]:
    count = len(devices)
    if config.preset:
        preset = find_preset(config.preset)
        kind = devices[0].device_kind
        chip = find_chip(kind)
        if preset.num_chips not in (0, count) or (preset.chip and (chip is None or chip.name != preset.chip)):
            wanted = f"{preset.num_chips} {preset.chip or 'GPU'} chips"
            raise UserError(
                f"mesh.preset={config.preset}: is for {wanted}, and here are {count} of {kind}; set another"
            )
        return preset_shape(preset, config, count, sum(d.process_index == devices[0].process_index for d in devices))
    inner = config.fsdp * config.tensor
    data = count // inner if config.data == -1 else config.data
    if data < 1 or data * inner != count:
        wanted = " × ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"mesh {wanted} does not divide the {count} devices; make the product {count} (data=-1: the rest)"
        )
    return data, config.fsdp, config.tensor


def _require_inside(mesh: Mesh) -> None:
    """UserError where the devices that share one copy of the parameters are of several slices (of GPUs: hosts)."""
    for group in mesh.devices:
        devices = list(group.flat)
        what = "host" if devices[0].platform in ("gpu", "cuda", "rocm") else "slice"
        homes = {device.process_index if what == "host" else getattr(device, "slice_index", 0) for device in devices}
        if len(homes) > 1:
            raise UserError(
                f"mesh.rules=hybrid: {len(devices)} devices that share the parameters lie in {len(homes)} {what}s; lower "
                f"mesh.fsdp to the devices of a {what}, or set mesh.rules=fsdp"
            )
