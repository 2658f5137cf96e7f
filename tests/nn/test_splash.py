"""The splash kernel, interpreted, against the plain path: outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cv2jax.config import MeshConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Backbone, Qwen2Config
from cv2jax.nn import splash
from cv2jax.nn.attention import attend
from cv2jax.nn.masks import NO_CHUNK, ChunkMask, MaskSpec
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import BATCH_AXES, map_local


def draw(rows, length, heads, kv_heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def random_segments(rows, length, seed=0):
    """Packed rows: segments of any length, padding at the end."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 5, (rows, length)), axis=1)
    ids[np.arange(length) >= rng.integers(length // 2, length, (rows, 1))] = 0
    return jnp.asarray(ids, jnp.int32)


def pulled_back(impl, q, k, v, weights, mask):
    """(output, gradients), jitted."""

    def run(q, k, v, mask):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, mask=mask, impl=impl), q, k, v)
        return y, *pull(weights)

    return jax.jit(run)(q, k, v, mask)


def assert_equal_to_scale(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.parametrize(
    ("kind", "packed", "rows", "length", "heads", "kv_heads", "head_dim"),
    [
        ("causal", True, 2, 128, 7, 1, 8),
        pytest.param("causal", True, 1, 384, 6, 2, 64, marks=pytest.mark.full),
        pytest.param("causal", False, 1, 256, 3, 1, 128, marks=pytest.mark.full),
        ("full", True, 2, 256, 2, 2, 64),
        ("full", False, 1, 128, 2, 1, 72),  # like 8, padded to a multiple of 64
    ],
)
def test_output_and_gradients_are_those_of_the_plain_path(
    kind, packed, rows, length, heads, kv_heads, head_dim, monkeypatch
):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)  # up to nine blocks a head, of which the causal kernel skips three
    arrays = draw(rows, length, heads, kv_heads, head_dim)
    spec = MaskSpec(kind=kind, segments=random_segments(rows, length) if packed else None)
    assert_equal_to_scale(pulled_back("splash", *arrays, spec), pulled_back("xla", *arrays, spec))


def test_on_a_mesh_each_device_takes_its_rows_and_heads():
    mesh = make_mesh(MeshConfig(tensor=2))
    q, k, v, _ = draw(4, 128, 4, 2, 64)
    spec = MaskSpec(kind="causal", segments=random_segments(4, 128))
    heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    with jax.set_mesh(mesh):
        attend_splash = jax.jit(lambda q, k, v: attend(q, k, v, mask=spec, impl="splash"), in_shardings=heads)
        compiled = attend_splash.lower(q, k, v).compile()
        assert_equal_to_scale(compiled(*jax.device_put((q, k, v), heads)), attend(q, k, v, mask=spec))
    assert compiled.output_shardings.is_equivalent_to(heads, 4)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize(("tensor", "want"), [(2, [(1, 2), (1, 1)]), (4, [(2, 4), (2, 2)]), (8, [(4, 4), (4, 2)])])
def test_heads_stay_whole_where_the_mesh_does_not_divide_all_of_them(tensor, want):
    q, k, seen = jnp.ones((4, 4)), jnp.ones((4, 2)), []

    def double(q, k):
        seen[:] = [q.shape, k.shape]
        return 2 * q

    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor))):
        axes = ("batch", "act_heads")
        np.testing.assert_array_equal(map_local(double, [q, k], [axes, axes], axes), 2 * q)
    assert seen == want


def test_in_bfloat16_under_any_precision():
    """The tests' default is fp32 products, which the kernel has not for 16-bit operands (tests/aot compiles it)."""
    arrays = [a.astype(jnp.bfloat16) for a in draw(1, 128, 2, 1, 64)]
    spec = MaskSpec(kind="causal", segments=random_segments(1, 128))
    got = pulled_back("splash", *arrays, spec)
    want = pulled_back("xla", *(a.astype(jnp.float32) for a in arrays), spec)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    assert_equal_to_scale([a.astype(jnp.float32) for a in got], want, tolerance=0.02)


def test_without_a_mask_every_position_is_seen():
    arrays = draw(1, 128, 2, 1, 64)
    got = attend(*arrays[:3], impl="splash")
    assert_equal_to_scale(got, attend(*arrays[:3]))


def test_what_the_kernel_cannot_do_is_said():
    q, k, v, _ = draw(1, 128, 2, 1, 64)
    with pytest.raises(ValueError, match="pass a MaskSpec"):
        attend(q, k, v, mask=jnp.ones((1, 1, 1, 128), bool), impl="splash")
    with pytest.raises(ValueError, match="100 queries and 128 keys"):
        attend(q[:, :100], k, v, impl="splash")
    with pytest.raises(ValueError, match="multiple of 128"):
        attend(q[:, :100], k[:, :100], v[:, :100], impl="splash")


def test_a_scanned_rematerialised_decoder_is_the_same_with_it():
    config = Qwen2Config(width=24, mlp_dim=32, num_layers=2, num_heads=3, num_kv_heads=1, remat="full")
    segments = random_segments(1, 128)
    spec, positions = MaskSpec(kind="causal", segments=segments), jnp.tile(jnp.arange(128) % 50, (1, 1))
    x, weights = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 128, 24)), jnp.float32) for i in range(2))
    params = Qwen2Backbone(config).init(jax.random.key(0), x, positions, spec.array(128, 128))["params"]

    @functools.partial(jax.jit, static_argnames="impl")
    def run(params, mask, impl):
        def score(params):
            y = Qwen2Backbone(config, impl=impl).apply({"params": params}, x, positions, mask)[0]
            return jnp.sum(y * weights), y

        return jax.grad(score, has_aux=True)(params)

    want = run(params, spec.array(128, 128), impl="xla")
    assert_equal_to_scale(run(params, spec, impl="splash"), want, tolerance=2e-5)


ROWS = (ChunkMask(chunk=50), ChunkMask(chunk=100, left=60, prompt=37), ChunkMask(chunk=NO_CHUNK))


def test_each_row_has_its_own_chunk_mask():
    q, k, v, weights = draw(6, 256, 2, 2, 64)
    mask = MaskSpec(kind="chunk", rows=ROWS, segments=random_segments(6, 256))
    got = pulled_back("splash", q, k, v, weights, mask)
    assert_equal_to_scale(got, pulled_back("xla", q, k, v, weights, mask))
    assert_equal_to_scale(got, pulled_back("xla", q, k, v, weights, mask.as_data(6)))


def test_chunk_masks_that_the_kernel_cannot_take_are_refused():
    q, k, v, _ = draw(4, 128, 1, 1, 64)
    mask = MaskSpec(kind="chunk", rows=ROWS)
    with pytest.raises(ValueError, match="3 masks for a device's rows"):
        attend(q, k, v, mask=mask, impl="splash")
    with pytest.raises(ValueError, match="chunks that are data"):
        attend(q, k, v, mask=mask.as_data(4), impl="splash")


def test_rows_are_grouped_on_each_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    q, k, v, _ = draw(8, 128, 2, 2, 64, seed=3)
    mask = MaskSpec(kind="chunk", rows=(ChunkMask(chunk=20), ChunkMask(chunk=1)))
    want = attend(q, k, v, mask=mask)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *qkv: attend(*qkv, mask=mask, impl="splash"))(*jax.device_put((q, k, v), sharding))
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
