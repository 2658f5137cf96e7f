"""A layer of the official language model compiles for TPU with the splash kernel, and holds no logits."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from cv2jax.config import MeshConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Backbone, Qwen2Config
from cv2jax.nn.masks import MaskSpec
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules, batch_sharding

pytestmark = pytest.mark.aot
ROWS, LENGTH = 16, 2048


def compile_gradient(topology, mesh_config):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(mesh_config, devices)
    config = Qwen2Config(num_layers=1, dtype="bfloat16")

    def init(key):
        x = jnp.zeros((1, 1, config.width))
        return Qwen2Backbone(config).init(key, x, jnp.zeros((1, 1), jnp.int32), MaskSpec(kind="causal"))["params"]

    def loss(params, x, positions, segments):
        y = Qwen2Backbone(config, impl="auto").apply(
            {"params": params}, x, positions, MaskSpec(kind="causal", segments=segments)
        )[0]
        return jnp.sum(y.astype(jnp.float32) ** 2)

    params, shardings = abstract_state(init, mesh)
    batch = [((ROWS, LENGTH, config.width), jnp.bfloat16)] + [((ROWS, LENGTH), jnp.int32)] * 2
    batch = [jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for shape, dtype in batch]
    with jax.set_mesh(mesh), axis_rules():
        return jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, *batch).compile()


def test_a_packed_layer_on_sixteen_v5e_holds_no_logits():
    mesh = MeshConfig(fsdp=8, tensor=2)
    compiled = compile_gradient("v5e:4x4", mesh)
    text = compiled.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in text
    assert f"{LENGTH},{LENGTH}]" not in text
    logits = 4 * ROWS // mesh.fsdp * 14 // mesh.tensor * LENGTH**2  # bytes a chip, fp32
    assert compiled.memory_analysis().temp_size_in_bytes < logits
