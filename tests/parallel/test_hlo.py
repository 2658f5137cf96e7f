"""What a device does in an HLO module, by texts with figures by hand and by programs compiled for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cv2jax.config import MeshConfig
from cv2jax.parallel.chips import find_chip
from cv2jax.parallel.collectives import ici_bandwidth, parse_groups, seconds
from cv2jax.parallel.hlo import hlo_cost
from cv2jax.parallel.hlo_text import parse_hlo
from cv2jax.parallel.mesh import make_mesh


def module(body, more="", parts=8):
    entry = f"ENTRY %main (a: f32[8,128]) -> f32[8,128] {{\n{body}\n}}\n"
    return f"HloModule m, is_scheduled=true, num_partitions={parts}\n\n{more}\n\n{entry}"


def compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


def array(*shape, sharding=None, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_instructions_are_read():
    text = module(
        '  %a = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x (y) }"}\n'
        '  %t = (bf16[3,130]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[]{:T(128)}) custom-call(%a, %a), custom_call_target="f", '
        'frontend_attributes={kernel_metadata={\n"m":"1"\n}}, metadata={op_name="k"}\n'
        '  ROOT %r = f32[8,128]{1,0} negate(f32[8,128]{1,0} %a), backend_config={"n":{"k":"}"}}'
    )
    found = parse_hlo(text)
    main = found.computations[found.entry]
    assert found.num_partitions == 8
    assert [one.opcode for one in main.instructions.values()] == ["parameter", "custom-call", "negate"]
    t, r = main.instructions["t"], main.root
    assert (t.operands, t.attribute("custom_call_target")) == (("a", "a"), '"f"')
    assert t.attribute("metadata") == '{op_name="k"}'  # behind a line break
    assert [buffer.is_in_hbm for buffer in t.buffers] == [False, True]
    assert t.buffers[0].num_bytes == 3 * 130 * 2
    assert t.buffers[0].padded_bytes == 8 * 256 * 2
    assert (r.name, r.operands, r.backend_config) == ("r", ("a",), {"n": {"k": "}"}})
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("nothing")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("", [[0, 1, 2, 3]]),
        (", replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        (", channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=[2,2]<=[4], to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=[1,4]<=[4], to_apply=%add", [[0, 1, 2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups(text, groups):
    assert parse_groups(text, 4) == groups


@pytest.mark.parametrize("form", ["@mesh<x=2>", "mesh['a'=4] {'a':(1)2}"])
def test_replica_groups_of_another_form_are_an_error(form):
    with pytest.raises(ValueError, match="unknown form"):
        parse_groups(f"replica_groups={form}, to_apply=%add", 4)


MIB = 8 * 128 * 4  # bytes of f32[8,128]


@pytest.mark.parametrize(
    ("line", "ici", "dcn"),
    [
        ("f32[8,128]{1,0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add", 2 * 7 / 8, 0),
        ("f32[64,128]{1,0} all-gather(%a), replica_groups=[1,8]<=[8], dimensions={0}", 7, 0),
        ("f32[1,128]{1,0} reduce-scatter(%a), replica_groups=[1,8]<=[8], dimensions={0}", 7 / 8, 0),
        ("f32[8,128]{1,0} all-to-all(%a), replica_groups=[2,4]<=[8], dimensions={0}", 3 / 4, 0),
        ("f32[8,128]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 1, 0),
        ("f32[8,128]{1,0} collective-permute(%a), source_target_pairs={{0,4},{4,0}}", 0, 1),
        ("(f32[8,128]{1,0}, f32[64,128]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}", 7, 0),
        # Devices 0-3 and 4-7 are slices: pairs across, and all of both.
        ("f32[8,128]{1,0} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", 0, 2 * 1 / 2),
    ],
)
def test_collectives(line, ici, dcn):
    text = module(f"  %a = f32[8,128]{{1,0}} parameter(0)\n  ROOT %c = {line}")
    slices = [0] * 8 if not dcn else [0] * 4 + [1] * 4
    cost = hlo_cost(text, slice_of=slices)
    assert (cost.ici_bytes, cost.dcn_bytes) == (ici * MIB, dcn * MIB)


def test_a_sum_over_slices_works_inside_them_first():
    line = "f32[8,128]{1,0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add"
    cost = hlo_cost(module(f"  %a = f32[8,128]{{1,0}} parameter(0)\n  ROOT %c = {line}"), slice_of=[0] * 4 + [1] * 4)
    assert cost.ici_bytes == 2 * MIB * 3 / 4
    assert cost.dcn_bytes == 2 * MIB / 4 * 1 / 2
    assert cost.transfers[0].group == (0, 1, 2, 3)


def test_the_end_of_a_collective_is_not_a_second_one():
    body = (
        "  %a = f32[8,128]{1,0} parameter(0)\n"
        "  %s = f32[8,128]{1,0} all-reduce-start(%a), replica_groups=[1,8]<=[8], to_apply=%add\n"
        "  ROOT %d = f32[8,128]{1,0} all-reduce-done(%s)"
    )
    assert len(hlo_cost(module(body)).transfers) == 1


def test_the_tpu_compiler_s_own_forms():
    """A reduce-scatter is a fusion; between slices a sum goes through the host; a slice may be fetched ahead."""
    scatter = """%scatter (x: f32[64,128]) -> f32[8,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %s = f32[64,128]{1,0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %d = f32[8,128]{1,0} dynamic-slice(%s, %i, %z), dynamic_slice_sizes={8,128}
}"""
    body = (
        "  %a = f32[64,128]{1,0} parameter(0)\n"
        "  %f = f32[8,128]{1,0} fusion(%a), kind=kCustom, calls=%scatter\n"
        "  %n = (f32[8,128]{1,0}, u32[], token[]) send(%f, %t), is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %l = ((f32[64,128]{1,0}), f32[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:128]}\n"
        "  %m = f32[8,128]{1,0:S(1)} slice-done(%l)\n"
        '  %b = f32[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"'
    )
    cost = hlo_cost(module(body, scatter), slice_of=[0] * 8 + [1] * 8)  # written for one slice
    assert [one.kind for one in cost.transfers] == ["reduce-scatter", "all-reduce"]
    assert (cost.ici_bytes, cost.dcn_bytes) == (8 * MIB * 7 / 8, MIB)
    assert cost.hbm_bytes == (8 + 1) * MIB + MIB + MIB


def test_time_over_links():
    v5e, v5p, h100 = (find_chip(name) for name in ("v5e", "v5p", "H100"))
    square = [(x, y, 0) for x in range(16) for y in range(16)]
    assert ici_bandwidth(v5e, square[:16], (16, 16)) == 2 * v5e.link_bandwidth  # a ring, both ways
    assert ici_bandwidth(v5e, square, (16, 16)) == 4 * v5e.link_bandwidth
    assert ici_bandwidth(v5e, [(0, 0, 0), (1, 0, 0)], (4, 4)) == v5e.link_bandwidth  # a line
    assert ici_bandwidth(v5p, [(x, 0, z) for x in range(4) for z in range(4)], (4, 4, 4)) == 4 * v5p.link_bandwidth
    assert ici_bandwidth(h100, [(0, 0, 0)], (8,)) == h100.link_bandwidth
    line = "f32[8,128]{1,0} all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"
    text = module(f"  %a = f32[8,128]{{1,0}} parameter(0)\n  ROOT %c = {line}")
    ici, dcn = seconds(hlo_cost(text, slice_of=[0] * 4 + [1] * 4).transfers, v5e, jax.devices(), (2, 2))
    assert ici == 0
    np.testing.assert_allclose(dcn, MIB / (200e9 / 8 / 8))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_buffers_that_are_moved():
    body = (
        "  %a = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        "  %v = f32[8,128]{1,0:T(8,128)S(1)} negate(%a)\n"  # reads
        "  %w = f32[8,128]{1,0:T(8,128)S(1)} negate(%v)\n"  # nothing
        "  %b = f32[8,128]{1,0:T(8,128)} bitcast(%a)\n"  # nothing
        "  ROOT %r = f32[8,128]{1,0:T(8,128)} add(%w, %b)"  # reads b, writes
    )
    assert hlo_cost(module(body)).hbm_bytes == 3 * MIB


SLICED = """%fused (p: f32[24,8,128], i: s32[], u: f32[1,8,128]) -> (f32[8,128], f32[24,8,128]) {
  %p = f32[24,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8,128]{2,1,0} parameter(2)
  %z = s32[] constant(0)
  %s = f32[1,8,128]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,128}
  %b = f32[8,128]{1,0} bitcast(%s)
  %d = f32[24,8,128]{2,1,0} dynamic-update-slice(%p, %u, %i, %z, %z)
  ROOT %t = (f32[8,128]{1,0}, f32[24,8,128]{2,1,0}) tuple(%b, %d)
}"""


def test_of_a_stack_the_slice_counts():
    body = (
        "  %p = f32[24,8,128]{2,1,0} parameter(0)\n  %i = s32[]{:S(2)} parameter(1)\n  %u = f32[1,8,128]{2,1,0} parameter(2)\n"
        "  ROOT %f = (f32[8,128]{1,0}, f32[24,8,128]{2,1,0}) fusion(%p, %i, %u), kind=kLoop, calls=%fused"
    )
    # Reads the slice and the update, writes both.
    assert hlo_cost(module(body, SLICED)).hbm_bytes == 4 * MIB


LOOP = """%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%t), index=1
  %n = f32[8,128]{1,0} negate(%x)
  ROOT %r = (s32[], f32[8,128]{1,0}) tuple(%i, %n)
}

%cond (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[]{:S(2)}, f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%t), index=0
  %c = s32[]{:S(2)} constant(24)
  ROOT %l = pred[]{:S(2)} compare(%i, %c), direction=LT
}"""


@pytest.mark.parametrize(
    ("config", "first", "trips"), [('{"known_trip_count":{"n":"7"}}', 0, 7), ("{}", 0, 24), ("{}", 1, 23)]
)
def test_loops_count_as_often_as_they_run(config, first, trips):
    body = (
        f"  %f = s32[] constant({first})\n  %g = s32[]{{:S(6)}} copy(%f)\n  %t = (s32[], f32[8,128]) tuple(%g, %x)\n"
        f"  ROOT %w = (s32[], f32[8,128]{{1,0}}) while(%t), condition=%cond, body=%body, backend_config={config}"
    )
    cost = hlo_cost(module(body, LOOP))
    assert cost.hbm_bytes == trips * 2 * MIB + 4  # the counter's copy reads it
    assert not cost.unknown


def test_a_loop_without_a_number_is_told():
    body = "  ROOT %w = (s32[], f32[8,128]{1,0}) while(%t), condition=%cond, body=%body"
    assert hlo_cost(module(body, LOOP.replace("constant(24)", "negate(%i)"))).unknown == {"trips of w"}


def test_kernels():
    line = (
        '  ROOT %splash_fwd.3 = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"'
        ', metadata={op_name="jit(f)/splash_fwd"}'
    )
    text = module("  %a = f32[8,128]{1,0} parameter(0)\n" + line)
    assert hlo_cost(text, kernels={"splash_fwd": (3.0, 300.0), "splash": (1.0, 1.0)}).flops == 100
    assert hlo_cost(text).unknown == {"flops of splash_fwd.3"}
    told = text.replace(
        'splash_fwd"}', 'splash_fwd"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":55}}}'
    )
    assert hlo_cost(told).flops == 55


# ── programs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_program_without_loops_agrees_with_the_compiler():
    def run(x, w):
        return jnp.tanh(x @ w) @ w.T

    program = compiled(run, array(64, 32), array(32, 48))
    cost = hlo_cost(program.as_text())
    assert cost.flops == 2 * 2 * 64 * 32 * 48
    assert 0.9 < cost.flops / program.cost_analysis()["flops"] <= 1  # which counts the elementwise work too


def test_a_scan_counts_each_trip():
    def run(x, w):
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=12)[0]

    program = compiled(run, array(64, 32), array(32, 32))
    assert hlo_cost(program.as_text()).flops == 12 * 2 * 64 * 32 * 32
    assert program.cost_analysis()["flops"] < 2 * 2 * 64 * 32 * 32 * 2


def test_convolutions():
    def run(x, w):
        return lax.conv_general_dilated(
            x, w, (2,), ((1, 1),), rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    program = compiled(run, array(4, 33, 8), array(3, 8, 16))
    outputs = (33 + 2 - 5) // 2 + 1
    assert hlo_cost(program.as_text()).flops == 2 * 4 * (3 * outputs - 2) * 8 * 16


def test_fsdp_gathers_its_parameters_and_scatters_their_gradients():
    mesh = make_mesh(MeshConfig(fsdp=8))
    rows, cols = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("fsdp"))

    def step(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    program = compiled(step, array(256, 128, sharding=cols), array(64, 256, sharding=rows), out_shardings=cols)
    cost = hlo_cost(program.as_text())
    size = 256 * 128 * 4
    moved = {one.kind for one in cost.transfers}
    assert "all-gather" in moved
    # One gather; the sum is a reduce-scatter, or an all-reduce where the backend has none.
    assert size * 7 / 8 * 2 <= cost.ici_bytes <= size * 7 / 8 * 3
    assert cost.flops == 2 * 2 * 8 * 256 * 128
