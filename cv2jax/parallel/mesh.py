"""The device mesh: axes `data` (replicas), `fsdp` (parameters and batch split) and `tensor` (inside a layer)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cv2jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the configured shape over `devices` (default all); raises UserError when it does not divide them.

    Over several slices (TPU pods joined by the data-centre network) the `data` axis is laid across the slices, so that
    only gradient sums leave a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    shape = (data, config.fsdp, config.tensor)
    if data < 1 or data * inner != len(devices):
        wanted = " × ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        count = len(devices)
        raise UserError(
            f"mesh {wanted} does not divide the {count} devices; make the product {count} (data=-1: the rest)"
        )
    num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    kinds = (AxisType.Auto,) * len(AXES)  # linen's logical constraints need Auto axes
    if num_slices > 1:
        if data % num_slices:
            raise UserError(
                f"mesh.data={data} does not divide into {num_slices} slices; make it a multiple of {num_slices}"
            )
        inside = (data // num_slices, config.fsdp, config.tensor)
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (num_slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
        return Mesh(np.asarray(grid), AXES, axis_types=kinds)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
