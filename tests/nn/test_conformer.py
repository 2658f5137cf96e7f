"""The conformer's attention against its definition, and in steps against itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.cache import append, init_cache
from cv2jax.nn.conformer import ConformerBlock, RelativeAttention, step_context, whole_context
from cv2jax.nn.masks import NO_LEFT, chunk_array
from cv2jax.nn.relpos import sinusoid

WIDTH, HEADS, LENGTH = 12, 3, 14


def mask_between(queries, keys):
    one = jnp.ones((1,), jnp.int32)
    return chunk_array(4 * one, NO_LEFT * one, 0 * one, queries, keys)


@pytest.fixture(scope="module")
def setup():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    places = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    context = whole_context(mask_between(places, places), WIDTH)
    block = ConformerBlock(WIDTH, HEADS, 20)
    params = nn.unbox(block.init(jax.random.key(1), x, None, True, context)["params"])
    keys = iter(jax.random.split(jax.random.key(2), 99))
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)
    return x, places, context, block, params


def test_logits_are_those_of_the_definition(setup):
    x, _, context, _, params = setup
    p = jax.tree.map(np.asarray, params["attention"])
    got, _ = RelativeAttention(WIDTH, HEADS).apply(
        {"params": params["attention"]}, x, None, context, deterministic=True
    )
    q, k, v = (np.einsum("btd,dhe->bthe", x, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value"))
    want, mask = np.zeros_like(x), np.broadcast_to(context.mask, (2, 1, LENGTH, LENGTH))
    for b, h, i in np.ndindex(2, HEADS, LENGTH):
        logits = np.full(LENGTH, -np.inf)
        for j in np.flatnonzero(mask[b, 0, i]):
            distance = np.asarray(sinusoid(jnp.asarray(i - j), WIDTH)) @ p["position_kernel"][:, h]
            content = (q[b, i, h] + p["content_bias"][h]) @ k[b, j, h]
            logits[j] = (content + (q[b, i, h] + p["position_bias"][h]) @ distance) / np.sqrt(WIDTH // HEADS)
        weights = np.exp(logits - logits.max())
        want[b, i] += (weights / weights.sum()) @ v[b, :, h] @ p["out"]["kernel"][h]
    np.testing.assert_allclose(got, want + p["out"]["bias"], atol=1e-5)


@pytest.mark.parametrize("first", [0, 5000])
def test_steps_are_the_whole_wherever_they_start(setup, first):
    x, places, context, block, params = setup
    run = jax.jit(block.apply, static_argnums=3)
    want, _ = run({"params": params}, x, None, True, context)
    cache, got = init_cache(1, 2, HEADS, LENGTH, WIDTH // HEADS, "float32"), []
    for start, stop in ((0, 4), (4, 12), (12, LENGTH)):
        at = places[:, start:stop] + first
        mask = mask_between(at - first, jnp.where(cache.positions < 0, -1, cache.positions - first))
        mask = jnp.concatenate([mask, mask_between(at - first, at - first)], axis=-1)
        part, (keys, values) = run(
            {"params": params}, x[:, start:stop], jnp.int32(0), True, step_context(mask, at, cache, WIDTH)
        )
        # Slots go by position modulo their number, so a stream may start anywhere.
        cache = jax.jit(append)(cache, (keys[None], values[None]), positions=at, num_pinned=jnp.zeros(2, jnp.int32))
        got.append(part)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=1e-5)


def test_dropout_draws_and_is_off_where_it_is_told(setup):
    x, _, context, _, params = setup
    block = ConformerBlock(WIDTH, HEADS, 20, dropout=0.5)
    run = lambda key: block.apply({"params": params}, x, None, False, context, rngs={"dropout": key})[0]  # noqa: E731
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    still, _ = block.apply({"params": params}, x, None, True, context)
    want, _ = ConformerBlock(WIDTH, HEADS, 20).apply({"params": params}, x, None, True, context)
    np.testing.assert_array_equal(still, want)
