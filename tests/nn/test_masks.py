"""Masks drawn as matrices."""

import jax.numpy as jnp
import numpy as np

from cv2jax.nn.masks import causal_mask, key_mask, length_mask


def test_length_mask():
    want = [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(length_mask(jnp.array([0, 2, 3]), 3), np.array(want, bool))


def test_length_mask_of_a_length_beyond_the_size_is_all_true():
    assert bool(length_mask(jnp.array([9]), 3).all())


def test_key_mask_broadcasts_over_heads_and_queries():
    mask = key_mask(length_mask(jnp.array([1, 2]), 3))
    assert mask.shape == (2, 1, 1, 3)
    np.testing.assert_array_equal(mask[1, 0, 0], [True, True, False])


def test_causal_mask():
    np.testing.assert_array_equal(causal_mask(3, 3)[0, 0], np.tril(np.ones((3, 3), bool)))


def test_causal_mask_of_a_cache_step_sees_everything_up_to_its_position():
    np.testing.assert_array_equal(causal_mask(1, 5, 2)[0, 0], [[True, True, True, False, False]])


def test_causal_mask_of_a_chunk_continues_the_diagonal():
    np.testing.assert_array_equal(causal_mask(2, 4, jnp.int32(1))[0, 0], [[1, 1, 0, 0], [1, 1, 1, 0]])
