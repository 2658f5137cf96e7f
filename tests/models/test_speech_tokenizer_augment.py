"""SpecAugment: where masks may lie, what they hold, and that rows differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer.augment import spec_augment

SHAPE = (32, 16, 60)
LENGTHS = jnp.asarray(np.random.default_rng(0).integers(20, 61, SHAPE[0]), jnp.int32).at[0].set(60).at[1].set(0)


@pytest.fixture(scope="module")
def mel():
    return jax.random.normal(jax.random.key(0), SHAPE) + 5.0


@pytest.fixture(scope="module")
def augment():
    return jax.jit(
        lambda mel, n, key, **kw: spec_augment(mel, n, key, max_freq_bins=6, **kw),
        static_argnames=("num_freq_masks", "num_time_masks", "max_time_share"),
    )


def test_padding_is_left_alone_and_does_not_enter_the_mean(mel, augment):
    dirty = jnp.where(jnp.arange(60) < LENGTHS[:, None, None], mel, 1e6)
    got, clean = augment(dirty, LENGTHS, jax.random.key(1)), augment(mel, LENGTHS, jax.random.key(1))
    for row, length in enumerate(np.asarray(LENGTHS)):
        np.testing.assert_array_equal(got[row, :, length:], 1e6)
        np.testing.assert_array_equal(got[row, :, :length], clean[row, :, :length])


def test_masked_values_are_the_rows_mean(mel, augment):
    out = augment(mel, LENGTHS, jax.random.key(1))
    assert bool(jnp.isfinite(out).all())
    for row, length in enumerate(np.asarray(LENGTHS)):
        changed = np.asarray(out[row] != mel[row])
        np.testing.assert_allclose(
            np.asarray(out[row])[changed], mel[row, :, :length].mean() if length else 0, rtol=1e-5
        )


def test_time_masks_are_whole_frames_within_their_share(mel, augment):
    shares = []
    for seed in range(5):
        out = augment(mel, LENGTHS, jax.random.key(seed), num_freq_masks=0, max_time_share=0.2)
        changed = np.asarray(out != mel)
        assert (changed.all(1) == changed.any(1)).all()
        frames = changed.any(1).sum(1)
        assert (frames <= 2 * np.floor(np.asarray(LENGTHS) * 0.2)).all()
        shares.append(frames[0])
    assert len(set(shares)) > 1


def test_frequency_masks_are_whole_bins_within_their_width(mel, augment):
    out = augment(mel, LENGTHS, jax.random.key(3), num_time_masks=0)
    for row, length in enumerate(np.asarray(LENGTHS)):
        changed = np.asarray(out != mel)[row, :, :length]
        bins = changed.any(1) if length else np.zeros(16, bool)
        assert (bins == (changed.all(1) if length else bins)).all()
        assert bins.sum() <= 12


def test_rows_and_keys_draw_their_own_masks(mel, augment):
    masks = np.asarray(augment(mel, LENGTHS, jax.random.key(1)) != mel)[:, :, :20]
    assert len({mask.tobytes() for mask in masks}) > 25
    other = np.asarray(augment(mel, LENGTHS, jax.random.key(2)) != mel)[:, :, :20]
    assert (masks != other).any()
    again = np.asarray(augment(mel, LENGTHS, jax.random.key(1)) != mel)[:, :, :20]
    np.testing.assert_array_equal(masks, again)


def test_no_masks_is_the_identity(mel, augment):
    out = augment(mel, LENGTHS, jax.random.key(1), num_freq_masks=0, num_time_masks=0)
    np.testing.assert_array_equal(out, mel)


def test_more_bins_than_there_are_is_allowed(mel):
    out = spec_augment(mel, LENGTHS, jax.random.key(1), max_freq_bins=40)
    assert out.shape == mel.shape
