"""`attend` against plain numpy."""

import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn import attention
from cv2jax.nn.attention import attend
from cv2jax.nn.masks import ChunkMask, MaskSpec, causal_mask, key_mask, length_mask


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def definition(q, k, v, mask=None):
    logits = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshc->bthc", weights, v)


@pytest.fixture(scope="module")
def qkv():
    return draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), draw(2, 7, 4, 6, seed=2)


def test_without_a_mask(qkv):
    np.testing.assert_allclose(attend(*qkv), definition(*qkv), atol=1e-5)


def test_with_padded_keys(qkv):
    mask = key_mask(length_mask(jnp.array([3, 7]), 7))
    np.testing.assert_allclose(attend(*qkv, mask=mask), definition(*qkv, mask), atol=1e-5)


def test_garbage_in_masked_keys_changes_nothing(qkv):
    q, k, v = qkv
    mask = key_mask(length_mask(jnp.array([3, 7]), 7))
    k2, v2 = k.at[0, 3:].set(1e4), v.at[0, 3:].set(-1e4)
    np.testing.assert_array_equal(attend(q, k, v, mask=mask), attend(q, k2, v2, mask=mask))


def test_causal(qkv):
    q, k, v = qkv
    out = attend(q, k[:, :5], v[:, :5], mask=causal_mask(5, 5))
    np.testing.assert_allclose(out, definition(q, k[:, :5], v[:, :5], np.tril(np.ones((5, 5), bool))), atol=1e-5)
    np.testing.assert_allclose(out[:, 0], v[:, 0], atol=1e-6)  # the first query sees itself only


def test_grouped_query_heads_share_keys(qkv):
    q, k, v = qkv
    pairs = np.array([0, 0, 1, 1])
    grouped = attend(q, k[:, :, :2], v[:, :, :2])
    np.testing.assert_allclose(grouped, definition(q, k[:, :, pairs], v[:, :, pairs]), atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_grouped_heads_under_a_mask_of_one_head_or_of_all(qkv, num_heads):
    q, k, v = qkv
    mask = np.random.default_rng(0).random((2, num_heads, 5, 7)) < 0.7
    mask[..., 0] = True
    pairs = np.array([0, 0, 1, 1])
    grouped = attend(q, k[:, :, :2], v[:, :, :2], mask=jnp.asarray(mask))
    np.testing.assert_allclose(grouped, definition(q, k[:, :, pairs], v[:, :, pairs], mask), atol=1e-5)


def test_keys_of_a_group_are_never_repeated_in_memory():
    q, k = jnp.zeros((1, 3, 8, 4)), jnp.zeros((1, 50, 2, 4))
    shapes = str(jax.make_jaxpr(attend)(q, k, k))
    assert "50,8,4" not in shapes


def test_a_row_without_any_key_is_finite_with_finite_gradients(qkv):
    q, k, v = qkv
    mask = jnp.zeros((2, 1, 1, 7), bool)
    out, grad = jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v, mask=mask)))(q)
    assert np.isfinite(out)
    assert np.isfinite(grad).all()
    mean = np.broadcast_to(v.mean(1, keepdims=True), q.shape)
    np.testing.assert_allclose(attend(q * 0, k, v, mask=mask), mean, atol=1e-5)


def test_softmax_is_float32_under_bfloat16(qkv):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in qkv)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert "f32" in str(jax.make_jaxpr(lambda *a: attend(*a))(q, k, v)).split("exp")[0].rsplit("\n", 1)[-1]
    np.testing.assert_allclose(out.astype(jnp.float32), definition(*qkv), atol=0.05)


@pytest.mark.parametrize("mask_shape", [None, (1, 1, 130, 140), (2, 3, 130, 140)])
def test_few_long_heads_are_products_of_their_own(mask_shape, monkeypatch):
    q, k, v = draw(2, 130, 3, 8), draw(2, 140, 3, 8, seed=1), draw(2, 140, 3, 8, seed=2)
    mask = None if mask_shape is None else np.random.default_rng(3).random(mask_shape) < 0.4
    run = lambda *qkv: attend(*qkv, mask=None if mask is None else jnp.asarray(mask))  # noqa: E731
    np.testing.assert_allclose(run(q, k, v), definition(q, k, v, mask), atol=1e-5)
    pull = jax.jit(jax.grad(lambda args: jnp.sum(jnp.sin(run(*args)))))
    got, text = pull((q, k, v)), jax.jit(run).lower(q, k, v).as_text()
    half = run(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), definition(q, k, v, mask), atol=0.03)
    monkeypatch.setattr(attention, "MAX_SIDE_BY_SIDE", 5)
    jax.clear_caches()
    pull = jax.jit(jax.grad(lambda args: jnp.sum(jnp.sin(run(*args)))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, pull((q, k, v)))
    assert text.count("dot_general") == 12
    assert jax.jit(run).lower(q, k, v).as_text().count("dot_general") == 2


def test_heads_on_a_mesh_stay_together():
    q = draw(2, 130, 3, 8)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        assert jax.jit(attend).lower(q, q, q).as_text().count("dot_general") == 2


def test_bad_arguments(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="known: xla"):
        attend(q, k, v, impl="flash")
    with pytest.raises(ValueError, match=r"bfloat16 or float16, not cpu and float32"):
        attend(q, k, v, impl="cudnn")
    with pytest.raises(ValueError, match="3 key/value heads"):
        attend(q, k[:, :, :3], v[:, :, :3])
    long = jnp.zeros((2, 200, 4, 8))
    for impl in ("xla", "splash", "auto"):
        with pytest.raises(ValueError, match="segments of length 199"):
            attend(long, long, long, mask=MaskSpec(kind="causal", segments=jnp.zeros((2, 199), jnp.int32)), impl=impl)


def packed(rows, length, seed=0):
    """Segments of any length, padding at the end."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    ids[np.arange(length) >= rng.integers(length // 2, length + 1, (rows, 1))] = 0
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("seed", range(3))
def test_causal_blocks_are_the_dense_definition_with_its_gradients(seed, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "MAX_BLOCKS", 3)
    rng = np.random.default_rng(seed)
    rows, length, kv_heads, group = rng.integers((1, 9, 1, 1), (4, 60, 4, 8)).tolist()
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    q, k, v, weights = (draw(rows, length, n, 6, seed=9 * seed + i) for i, n in enumerate(heads))
    spec = MaskSpec(kind="causal", segments=packed(rows, length, seed) if seed else None)

    @jax.jit
    def pulled_back(mask):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, mask=mask), q, k, v)
        return y, *pull(weights)

    for got, want in zip(pulled_back(spec), pulled_back(spec.array(length, length)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_causal_blocks_never_hold_all_logits():
    q, k = jnp.zeros((1, 300, 4, 8)), jnp.zeros((1, 300, 2, 8))
    loss = lambda mask: lambda q: jnp.sum(attend(q, k, k, mask=mask))  # noqa: E731
    spec = MaskSpec(kind="causal", segments=jnp.ones((1, 300), jnp.int32))
    sizes = lambda mask: max(  # noqa: E731
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(jax.grad(loss(mask)))(q)))
    )
    assert sizes(spec.array(300, 300)) == 4 * 300 * 300
    assert sizes(spec) <= 4 * 128 * 300


def test_causal_blocks_in_bfloat16():
    q, k, v = draw(1, 150, 4, 8), draw(1, 150, 2, 8, seed=1), draw(1, 150, 2, 8, seed=2)
    spec = MaskSpec(kind="causal", segments=packed(1, 150))
    grads = jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, mask=spec))), (0, 1, 2)))
    want = grads(q, k, v)
    got = grads(*(a.astype(jnp.bfloat16) for a in (q, k, v)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


CHUNKS = MaskSpec(kind="chunk", rows=(ChunkMask(chunk=2, left=1, prompt=1), ChunkMask(chunk=4)))


@pytest.mark.parametrize("kind", ["full", "causal", "array", "chunk", "chunk as data"])
@pytest.mark.parametrize("with_segments", [False, True])
def test_what_cudnn_is_given_means_the_same_mask(kind, with_segments):
    q, k, v = draw(2, 6, 4, 8), draw(2, 6, 2, 8, seed=1), draw(2, 6, 2, 8, seed=2)
    segments = packed(2, 6) if with_segments else None
    if kind == "array":
        mask = key_mask(length_mask(jnp.array([3, 6]), 6))
    elif kind.startswith("chunk"):
        mask = (CHUNKS.as_data(2) if kind.endswith("data") else CHUNKS).replace(segments=segments)
    else:
        mask = MaskSpec(kind=kind, segments=segments)
    is_causal, given = attention.cudnn_mask(mask, 6, 6, 2)
    assert given is None or given.shape[2:] == (6, 6)
    got = jax.nn.dot_product_attention(q, k, v, mask=given, is_causal=is_causal, implementation="xla")
    np.testing.assert_allclose(got, attend(q, k, v, mask=mask), atol=1e-5)


@pytest.mark.parametrize("as_data", [False, True])
def test_each_row_has_its_own_chunk_mask(as_data):
    q, k, v = draw(4, 6, 4, 8), draw(4, 6, 4, 8, seed=1), draw(4, 6, 4, 8, seed=2)
    got = attend(q, k, v, mask=CHUNKS.as_data(4) if as_data else CHUNKS)
    small = ["11....", "11....", "1111..", "1111..", "1..111", "1..111"]
    large = ["1111.."] * 4 + ["111111"] * 2
    mask = np.array([[[sign == "1" for sign in line] for line in lines] for lines in (small, large) * 2])[:, None]
    np.testing.assert_allclose(got, definition(q, k, v, mask), atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_cudnn_on_a_gpu():
    q, k, v = (a.astype(jnp.bfloat16) for a in (draw(2, 256, 14, 64), draw(2, 256, 2, 64, seed=1), draw(2, 256, 2, 64)))
    mask = MaskSpec(kind="causal", segments=packed(2, 256))
    run = lambda impl: jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv, mask=mask, impl=impl) ** 2), (0, 1, 2)))  # noqa: E731
    for a, b in zip(run("cudnn")(q, k, v), run("xla")(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=0.03 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("where", "capability", "dtype", "length", "mask", "want"),
    [
        ("cpu", "", "float32", 256, MaskSpec(), "xla"),
        ("tpu", "", "float32", 256, MaskSpec(kind="causal"), "splash"),
        ("tpu", "", "bfloat16", 256, None, "splash"),
        ("tpu", "", "bfloat16", 200, None, "xla"),
        ("tpu", "", "bfloat16", 256, "array", "xla"),
        ("tpu", "", "bfloat16", 256, MaskSpec(kind="chunk", rows=CHUNKS.rows[:1]), "splash"),
        ("tpu", "", "bfloat16", 256, CHUNKS, "xla"),  # one row does not hold two masks
        ("tpu", "", "bfloat16", 256, CHUNKS.as_data(1), "xla"),
        ("gpu", "9.0", "bfloat16", 256, CHUNKS.as_data(1), "cudnn"),
        ("gpu", "9.0", "bfloat16", 256, "array", "cudnn"),
        ("gpu", "8.6", "float16", 256, MaskSpec(kind="causal"), "cudnn"),
        ("gpu", "9.0", "bfloat16", 1, None, "xla"),  # decoding
        ("gpu", "9.0", "bfloat16", 255, None, "xla"),
        ("gpu", "9.0", "float32", 256, None, "xla"),
        ("gpu", "7.5", "float16", 256, None, "xla"),
        ("gpu", "gfx942", "bfloat16", 256, None, "xla"),
    ],
)
def test_auto_takes_what_can_run(where, capability, dtype, length, mask, want, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: where)
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(attention.jax, "devices", lambda: [device])
    q = jnp.zeros((1, length, 2, 64), dtype)
    mask = jnp.ones((1, 1, length, length), bool) if isinstance(mask, str) else mask
    assert attention._fastest(q, q, mask) == want


def test_auto_runs_here(qkv):
    np.testing.assert_array_equal(attend(*qkv, impl="auto"), attend(*qkv))
