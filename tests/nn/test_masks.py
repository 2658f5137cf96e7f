"""Masks drawn as matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.masks import MaskSpec, causal_mask, key_mask, length_mask


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


SEGMENTS = jnp.array([[1, 1, 2, 0], [3, 3, 3, 3]])


def test_segments_see_themselves_and_padding_sees_padding():
    full, causal = (MaskSpec(kind=kind, segments=SEGMENTS).array(4, 4) for kind in ("full", "causal"))
    assert full.shape == causal.shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(full[0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert full[1].all()
    np.testing.assert_array_equal(causal[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(causal[1, 0], np.tril(np.ones((4, 4), bool)))


def test_without_segments_a_spec_is_its_kind():
    assert MaskSpec().array(2, 3).all()
    np.testing.assert_array_equal(MaskSpec(kind="causal").array(2, 3), causal_mask(2, 3))


def test_no_row_is_ever_empty():
    segments = jnp.asarray(np.random.default_rng(1).integers(0, 3, (5, 11)), jnp.int32)
    assert MaskSpec(kind="causal", segments=segments).array(11, 11).any(-1).all()


def test_a_spec_passes_through_jit_and_scan_with_its_kind():
    spec = MaskSpec(kind="causal", segments=SEGMENTS)
    got = jax.jit(lambda m: jax.lax.scan(lambda c, _: (c, c.array(4, 4)), m, length=2)[1])(spec)
    np.testing.assert_array_equal(got[1], spec.array(4, 4))


def test_a_spec_that_cannot_be_is_said():
    with pytest.raises(ValueError, match="'chunky' is unknown; known: full, causal"):
        MaskSpec(kind="chunky")
    with pytest.raises(ValueError, match="segments of length 4 cannot mask 4 queries and 5 keys"):
        MaskSpec(segments=SEGMENTS).array(4, 5)
