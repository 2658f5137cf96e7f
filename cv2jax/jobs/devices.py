"""The devices of this host that share a job's rows, without the other hosts."""

import jax
from jax.sharding import Mesh

from cv2jax.config import MeshConfig
from cv2jax.parallel.mesh import make_mesh


def local_mesh() -> Mesh | None:
    """All devices of this host share the rows; on a CPU one device takes every core anyway."""
    devices = jax.local_devices()
    return None if devices[0].platform == "cpu" or len(devices) == 1 else make_mesh(MeshConfig(), devices)


def name_devices(mesh: Mesh | None) -> str:
    """What rounds alike: kind and number of the devices of `local_mesh`."""
    return f"{jax.local_devices()[0].device_kind} × {1 if mesh is None else mesh.size}"
