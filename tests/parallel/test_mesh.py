"""Meshes: shapes, the rest for `data`, and one clear error."""

import jax
import pytest
from jax.sharding import AxisType

from cv2jax.config import MeshConfig, UserError
from cv2jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "shape"), [(-1, 1, 1, (8, 1, 1)), (-1, 2, 2, (2, 2, 2)), (1, 4, 2, (1, 4, 2))]
)
def test_shape(data, fsdp, tensor, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "config", [MeshConfig(fsdp=3), MeshConfig(data=4, fsdp=4), MeshConfig(data=2), MeshConfig(tensor=16)]
)
def test_a_mesh_that_does_not_divide_the_devices_is_named(config):
    with pytest.raises(UserError, match="does not divide the 8 devices"):
        make_mesh(config)


def test_a_part_of_the_devices():
    assert make_mesh(MeshConfig(fsdp=2), jax.devices()[:4]).size == 4
