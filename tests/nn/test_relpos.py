"""Relative positions: the two ways of scoring distances agree with their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.relpos import relative_sinusoid, rotate_queries, shift, sinusoid


def test_sinusoids_by_hand():
    got = np.asarray(sinusoid(jnp.array([0, 3, -2]), 4))
    want = [[f(p * w) for w in (1.0, 0.01) for f in (np.sin, np.cos)] for p in (0, 3, -2)]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_largest_distance_comes_first():
    np.testing.assert_array_equal(relative_sinusoid(3, 8), sinusoid(jnp.array([2, 1, 0, -1, -2]), 8))


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_shift_puts_the_score_of_a_distance_at_its_key(length):
    distances = np.arange(length - 1, -length, -1)
    scores = jnp.asarray(np.tile(distances, (2, 3, length, 1)) + 100.0 * np.arange(length)[:, None], jnp.float32)
    i, j = np.mgrid[:length, :length]
    np.testing.assert_array_equal(shift(scores), np.broadcast_to(i - j + 100 * i, (2, 3, length, length)))


@pytest.mark.parametrize("seed", range(3))
def test_turned_queries_score_keys_at_any_positions(seed):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(2, 3, 2, 16)), jnp.float32)
    queries = jnp.asarray(rng.integers(-50, 3000, (2, 3)), jnp.int32)
    keys = jnp.asarray(rng.integers(-50, 3000, (2, 7)), jnp.int32)
    with jax.default_matmul_precision("highest"):
        got = jnp.einsum("bthd,bsd->bhts", rotate_queries(weights, queries), sinusoid(keys, 16))
        distances = sinusoid(queries[:, :, None] - keys[:, None], 16)
        want = jnp.einsum("bthd,btsd->bhts", weights, distances)
    np.testing.assert_allclose(got, want, atol=2e-3)  # fp32 angles of thousands of radians
