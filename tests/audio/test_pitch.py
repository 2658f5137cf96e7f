"""The pitch track on sounds whose pitch is known."""

import jax
import numpy as np
import pytest

from cv2jax.audio.pitch import pitch_track

RATE, HOP = 16000, 640


def tone(hz, seconds=1.0, harmonics=6):
    t = np.arange(int(seconds * RATE)) / RATE
    return sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, harmonics + 1)).astype(np.float32) * 0.1


@pytest.mark.parametrize("hz", [75, 110, 180, 261.6, 440])
def test_a_harmonic_tone_has_its_pitch(hz):
    f0, mask = pitch_track(tone(hz)[None], None, RATE, HOP)
    assert f0.shape == mask.shape == (1, 25)
    np.testing.assert_allclose(f0[0, 1:-1], hz, rtol=0.01)


def test_noise_and_silence_are_unvoiced():
    noise = np.random.default_rng(0).normal(size=RATE).astype(np.float32) * 0.1
    f0, _ = pitch_track(np.stack([noise, np.zeros(RATE, np.float32)]), None, RATE, HOP)
    assert (f0[0] > 0).mean() < 0.2
    assert not f0[1].any()


def test_padding_changes_nothing_and_is_masked():
    alone, _ = pitch_track(tone(150, 0.5)[None], None, RATE, HOP)
    padded = np.full((1, RATE), np.nan, np.float32)
    padded[0, : RATE // 2] = tone(150, 0.5)
    f0, mask = pitch_track(padded, np.array([RATE // 2], np.int32), RATE, HOP)
    assert mask.sum() == 13
    np.testing.assert_allclose(f0[0, :13], alone[0], rtol=1e-5)
    assert not f0[0, 13:].any()


def test_jit_equals_numpy():
    wave = np.stack([tone(200), tone(90)])
    count = np.array([RATE, 9000], np.int32)
    ours, mask = jax.jit(pitch_track, static_argnums=(2, 3))(wave, count, RATE, HOP)
    theirs, mask_numpy = pitch_track(wave, count, RATE, HOP)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    np.testing.assert_array_equal(mask, mask_numpy)


def test_an_empty_row_is_not_nan():
    f0, mask = pitch_track(np.zeros((1, 0), np.float32), None, RATE, HOP)
    assert f0.shape == mask.shape == (1, 0)
    f0, mask = pitch_track(tone(100)[None], np.array([0], np.int32), RATE, HOP)
    assert not mask.any()
    assert np.isfinite(f0).all()
