"""What the speaker encoder reads: crops, speeds, noise; silence and what is too short count as nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.fbank import kaldi_fbank
from cv2jax.audio.resample import resample
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.features import random_crop, speaker_features, training_features

RATE = 24_000
PLAIN = SpeakerEncoderConfig(crop_seconds=0.4)
training = jax.jit(training_features, static_argnums=(0, 4))
whole = jax.jit(speaker_features, static_argnums=2)


def tones(num_samples, size, frequency=300.0):
    """int16 rows of a tone in noise, 0 behind their ends."""
    rng, t = np.random.default_rng(0), np.arange(size) / RATE
    rows = 5000 * np.sin(2 * np.pi * frequency * t) + 500 * rng.normal(size=(len(num_samples), size))
    return jnp.asarray(np.where(t * RATE < np.array(num_samples)[:, None], rows, 0).astype(np.int16))


def test_features_are_those_of_each_row_alone():
    num_samples = [24_000, 9_000, 1_500]
    waveform = tones(num_samples, 30_000)
    features, num_frames = whole(waveform, jnp.array(num_samples), RATE)
    for row, count in enumerate(num_samples):
        alone = resample(np.asarray(waveform[row : row + 1, :count], np.float32) / 32768, RATE, 16_000)
        want, [frames] = kaldi_fbank(alone, subtract_mean=True)
        assert num_frames[row] == frames
        np.testing.assert_allclose(features[row, :frames], want[0], atol=2e-3)
        assert not np.any(features[row, frames:])


@pytest.mark.parametrize("bad", ["silent", "50 ms", "empty"])
def test_what_has_no_voice_has_no_frames_in_use_and_in_training(bad):
    num_samples = {"silent": [20_000, 20_000], "50 ms": [20_000, 1_200], "empty": [20_000, 0]}[bad]
    waveform = tones(num_samples, 20_000)
    if bad == "silent":
        waveform = waveform.at[1].set(jnp.tile(jnp.array([0, 3], jnp.int16), 10_000))
    noisy = dataclasses.replace(PLAIN, noise_share=1.0)
    for features, num_frames, *_ in (
        whole(waveform, jnp.array(num_samples), RATE),
        training(noisy, jax.random.key(0), waveform, jnp.array(num_samples), RATE),
    ):
        assert num_frames[0] > 10
        assert num_frames[1] == 0
        assert np.isfinite(features).all()


def test_clipped_audio_is_features_like_any():
    loud = jnp.clip(tones([20_000], 20_000).astype(jnp.int32) * 30, -32768, 32767).astype(jnp.int16)
    features, num_frames = whole(loud, jnp.array([20_000]), RATE)
    assert num_frames[0] > 50
    assert np.isfinite(features).all()


def test_crops_lie_anywhere_inside_their_row_and_short_rows_are_whole():
    waveform = jnp.tile(jnp.arange(100, dtype=jnp.int16), (400, 1))
    num_samples = jnp.where(jnp.arange(400) < 200, 60, 7)
    cut, counts = random_crop(jax.random.key(0), waveform, num_samples, 20)
    starts = np.asarray(cut[:, 0])
    assert set(starts[:200]) == set(range(41))
    assert set(starts[200:]) == {0}
    np.testing.assert_array_equal(cut - cut[:, :1], np.tile(np.arange(20), (400, 1)))
    np.testing.assert_array_equal(counts, np.where(np.arange(400) < 200, 20, 7))


def test_undisturbed_a_row_that_fits_the_crop_is_as_in_use():
    num_samples = jnp.array([9_600, 5_000])
    waveform = tones(num_samples.tolist(), 9_600)
    want, want_frames = whole(waveform, num_samples, RATE)
    got, num_frames, speed = training(PLAIN, jax.random.key(1), waveform, num_samples, RATE)
    np.testing.assert_array_equal(num_frames, want_frames)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert not np.any(speed)


def test_speeds_shift_the_pitch_and_leave_the_crops_length():
    config = dataclasses.replace(PLAIN, speeds=(0.8, 1.0, 1.25))
    num_samples = [24_000] * 30 + [6_000] * 30
    waveform = tones(num_samples, 24_000, 1_000.0)
    _, num_frames, speed = training(config, jax.random.key(2), waveform, jnp.array(num_samples), RATE)
    assert set(np.asarray(speed).tolist()) == {0, 1, 2}
    peaks = np.asarray(kaldi_bins(config, waveform, num_samples))
    for index in range(3):
        rows = np.flatnonzero(np.asarray(speed) == index)
        long, short = rows[rows < 30], rows[rows >= 30]
        assert set(np.asarray(num_frames)[long].tolist()) == {38}
        [frames] = set(np.asarray(num_frames)[short].tolist())
        assert frames == {0: 29, 1: 23, 2: 18}[index]
    slow, plain, fast = (np.median(peaks[np.asarray(speed) == i]) for i in range(3))
    assert slow < plain < fast


def kaldi_bins(config, waveform, num_samples):
    """The loudest band of each row at the speeds that the same key draws, without the mean taken away."""
    chosen = training(config, jax.random.key(2), waveform, jnp.array(num_samples), RATE)[2]
    found = []
    for row, index in zip(np.asarray(waveform, np.float32) / 32768, np.asarray(chosen), strict=True):
        sound = resample(row[None], round(RATE * config.speeds[index]), 16_000)[:, :3_000]
        found.append(int(kaldi_fbank(sound)[0][0].mean(0).argmax()))
    return found


def test_noise_comes_to_its_share_at_its_level_and_gain_moves_nothing_above_the_floor():
    num_samples = jnp.array([9_600] * 200)
    waveform = tones(num_samples.tolist(), 9_600)
    plain, *_ = training(PLAIN, jax.random.key(3), waveform, num_samples, RATE)
    noisy = dataclasses.replace(PLAIN, noise_share=0.3, min_snr_db=5.0, max_snr_db=5.0)
    got, *_ = training(noisy, jax.random.key(3), waveform, num_samples, RATE)
    changed = np.abs(np.asarray(got - plain)).max((1, 2)) > 1e-3
    assert 0.2 < changed.mean() < 0.4
    louder = dataclasses.replace(PLAIN, max_gain_db=6.0)
    got, *_ = training(louder, jax.random.key(3), waveform, num_samples, RATE)
    moved = np.abs(np.asarray(got - plain))
    assert moved.max() > 0
    assert np.mean(moved > 5e-3) < 0.01


def test_draws_hang_on_the_key_alone():
    config = dataclasses.replace(PLAIN, noise_share=0.5, max_gain_db=3.0, speeds=(0.9, 1.0))
    waveform, num_samples = tones([20_000] * 4, 20_000), jnp.array([20_000] * 4)
    one, other, again = (
        np.asarray(training(config, jax.random.key(seed), waveform, num_samples, RATE)[0]) for seed in (1, 2, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
