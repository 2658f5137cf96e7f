"""`attend` against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.attention import attend
from cv2jax.nn.masks import causal_mask, key_mask, length_mask


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


def test_bad_arguments(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="known: 'xla'"):
        attend(q, k, v, impl="cudnn")
    with pytest.raises(ValueError, match="3 key/value heads"):
        attend(q, k[:, :, :3], v[:, :, :3])
