"""FLOPs, bytes and collectives of programs that libtpu compiles, beside figures by hand."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cv2jax.config import MeshConfig
from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.splash import attend_splash
from cv2jax.parallel.collectives import seconds
from cv2jax.parallel.flops import count_work
from cv2jax.parallel.hlo import hlo_cost
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.presets import chip_of, parse_topology
from cv2jax.parallel.sharding import axis_rules

pytestmark = pytest.mark.aot
BF16, F32 = jnp.bfloat16, jnp.float32
WHOLE, ROWS = P(), P(("data", "fsdp"))
MIB = 2**20


def mesh_of(topology, config=MeshConfig(), **options):
    if topology == "v5e:1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return make_mesh(config, devices)


def compiled(function, mesh, *arrays, out=WHOLE):
    """(program, traced work) of a function of arrays given as (shape, dtype, PartitionSpec)."""
    args = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in arrays]
    place = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=lambda x: isinstance(x, P))
    with jax.set_mesh(mesh), axis_rules():
        work = count_work(jax.make_jaxpr(function)(*args))
        return jax.jit(function, out_shardings=place).lower(*args).compile(), work


def test_a_product_reads_its_operands_and_writes_its_result():
    size = 8192
    square = ((size, size), BF16, WHOLE)
    program, _ = compiled(lambda x, w: x @ w, mesh_of("v5e:1x1"), square, square)
    cost = hlo_cost(program.as_text())
    assert cost.flops == 2 * size**3
    assert cost.hbm_bytes == 3 * 2 * size**2
    told = program.cost_analysis()
    assert cost.flops == pytest.approx(told["flops"], rel=0.01)
    assert cost.hbm_bytes == pytest.approx(told["bytes accessed"], rel=0.01)


def test_a_scan_reads_a_layer_at_a_time():
    layers, rows, width = 12, 8192, 4096

    def run(x, w):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    arrays = ((rows, width), BF16, WHOLE), ((layers, width, width), BF16, WHOLE)
    program, work = compiled(run, mesh_of("v5e:1x1"), *arrays)
    cost = hlo_cost(program.as_text())
    assert cost.flops == work.flops == layers * 2 * rows * width**2
    weights, activations = layers * 2 * width**2, layers * 2 * 2 * rows * width
    # Each layer's weights once; its activations in and out, or in vector memory, and at most one copy of them.
    assert weights <= cost.hbm_bytes <= weights + 2 * activations
    assert program.cost_analysis()["flops"] < 0.2 * cost.flops  # the compiler counts the body once


def test_convolutions_and_their_gradients():
    def loss(x, w):
        y = lax.conv_general_dilated(x, w, (2,), ((3, 3),), dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.sum(jnp.square(y.astype(F32)))

    arrays = ((8, 256, 128), BF16, WHOLE), ((7, 128, 256), BF16, WHOLE)
    program, work = compiled(jax.value_and_grad(loss, (0, 1)), mesh_of("v5e:1x1"), *arrays, out=(WHOLE, (WHOLE, WHOLE)))
    assert hlo_cost(program.as_text()).flops == pytest.approx(work.flops, rel=1e-6)


def fsdp_step(w, x):
    """Loss and gradient of rematerialised layers whose kernels w [N, D, D] are split."""

    def layer(c, w):
        return jnp.tanh(c @ w.astype(BF16)), None

    def loss(w):
        return jnp.sum(lax.scan(jax.checkpoint(layer), x, w)[0].astype(F32))

    return jax.value_and_grad(loss)(w)


LAYERS, WIDTH, TOKENS = 6, 1024, 4096
FSDP = ((LAYERS, WIDTH, WIDTH), F32, P(None, "fsdp")), ((TOKENS, WIDTH), BF16, ROWS)


def test_layers_split_over_a_slice():
    mesh = mesh_of("v5e:4x4", MeshConfig(data=2, fsdp=8))
    program, work = compiled(fsdp_step, mesh, *FSDP, out=(WHOLE, FSDP[0][2]))
    cost = hlo_cost(program.as_text())
    # Forward, recomputed, and two products backward, of a sixteenth of the rows.
    one = 2 * TOKENS // 16 * WIDTH**2
    assert cost.flops == LAYERS * 4 * one
    assert cost.recomputed == LAYERS * one
    assert work.model_flops == 16 * LAYERS * 3 * one
    gathered = sum(one.ici_bytes for one in cost.transfers if one.kind == "all-gather")
    kernel = 2 * WIDTH**2  # in bfloat16
    assert gathered == LAYERS * 2 * kernel * 7 / 8
    summed = cost.ici_bytes - gathered
    assert LAYERS * kernel * 7 / 8 <= summed <= LAYERS * 2 * kernel + MIB
    ici, dcn = seconds(cost.transfers, chip_of(parse_topology("v5e:4x4")), list(mesh.devices.flat), (4, 4))
    assert (ici > 0, dcn) == (True, 0)


def test_of_two_slices_only_sums_cross():
    mesh = mesh_of("v5e:2x4", MeshConfig(fsdp=8), num_slices=2)
    program, _ = compiled(fsdp_step, mesh, *FSDP, out=(WHOLE, FSDP[0][2]))
    slices = [device.slice_index for device in mesh.devices.flat]
    cost = hlo_cost(program.as_text(), slice_of=slices)
    crossing = [one for one in cost.transfers if one.dcn_bytes]
    assert {one.kind for one in crossing} == {"all-reduce"}
    shard = LAYERS * 2 * WIDTH**2 / 8
    assert cost.dcn_bytes == pytest.approx(shard, rel=0.01)  # of a shard's gradient, half of twice
    gathered = sum(one.ici_bytes for one in cost.transfers if one.kind == "all-gather")
    scattered = sum(one.ici_bytes for one in cost.transfers if one.kind == "reduce-scatter")
    assert gathered == 2 * scattered == LAYERS * 2 * 2 * WIDTH**2 * 7 / 8


@pytest.mark.parametrize("kind", ["full", "causal"])
def test_kernels_cost_what_their_masks_leave(kind):
    def loss(q, k, v):
        return jnp.sum(attend_splash(q, k, v, MaskSpec(kind=kind)).astype(F32))

    mesh = mesh_of("v5e:2x2")
    x = ((8, 1024, 4, 64), BF16, ROWS)
    program, work = compiled(jax.grad(loss, (0, 1, 2)), mesh, x, x, x, out=(ROWS,) * 3)
    cost = hlo_cost(program.as_text(), kernels=work.kernels)
    assert cost.flops == pytest.approx(work.flops / 4, rel=1e-3)
    assert not cost.unknown
    blocks = 4 if kind == "full" else 3
    assert cost.flops == pytest.approx(9 * blocks * 2 * 2 * 4 * 512 * 512 * 64, rel=1e-3)
