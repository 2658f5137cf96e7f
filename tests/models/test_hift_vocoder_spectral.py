"""Spectral distances against their definitions in float64."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from cv2jax.audio.mel import mel_spectrogram
from cv2jax.audio.stft import RESOLUTIONS
from cv2jax.models.hift_vocoder.spectral import mel_distance, stft_distance

WIDTH = 7200


def waves(rows: int = 2, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    made, real = (0.2 * rng.standard_normal((2, rows, width))).astype(np.float32)
    return made * np.linspace(0.2, 2, width, dtype=np.float32), real


def magnitude(wave: np.ndarray, points: int, hop: int, window: int) -> np.ndarray:
    """[F K], by librosa's own framing and numpy's transform."""
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = librosa.util.frame(wave.astype(np.float64), frame_length=window, hop_length=hop).T * shape
    return np.maximum(np.abs(np.fft.rfft(frames, points)), 1e-7**0.5)


def test_the_resolutions_are_the_papers():
    """Parallel WaveGAN, table 1; those of the spectral discriminators too."""
    assert RESOLUTIONS == ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))


def test_the_distance_of_magnitudes_is_its_definition():
    made, real = waves()

    def wanted(a, b):
        pairs = [(magnitude(a, *r), magnitude(b, *r)) for r in RESOLUTIONS]
        convergence = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]
        return np.mean(convergence) + np.mean([np.abs(np.log(x / y)).mean() for x, y in pairs])

    want = [wanted(a, b) for a, b in zip(made, real, strict=True)]
    got = jax.jit(stft_distance)(made, real)
    assert got.shape == (2,)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_distance_of_mels_is_upstreams():
    """Up to 12 kHz: what lies above the model's 8 kHz counts."""
    made, real = waves()
    spectra = [mel_spectrogram(wave.astype(np.float64), fmax=None)[0] for wave in (made, real)]
    got = jax.jit(mel_distance)(made, real)
    np.testing.assert_allclose(got, np.abs(spectra[0] - spectra[1]).mean(axis=(1, 2)), rtol=1e-4)
    whistle = (0.3 * np.sin(2 * np.pi * 10_000 / 24_000 * np.arange(WIDTH)))[None].astype(np.float32)
    seen = mel_distance(jnp.asarray(real[:1] + whistle), jnp.asarray(real[:1]))[0]
    below = [mel_spectrogram(wave, fmax=8000.0)[0] for wave in (real[:1] + whistle, real[:1])]
    assert seen > 0.01
    assert np.abs(below[0] - below[1]).mean() < seen / 4


@pytest.mark.parametrize("distance", [mel_distance, stft_distance], ids=lambda f: f.__name__)
def test_every_distance_is_zero_of_equals_and_has_finite_slopes(distance):
    _, real = waves()
    real = jnp.asarray(real)
    assert not np.any(distance(real, real))
    gain = np.asarray(distance(2 * real, real))
    assert (gain > 0.1).all()
    silent = jnp.zeros_like(real)
    slope = jax.jit(jax.grad(lambda made: jnp.sum(distance(made, real))))
    assert np.isfinite(slope(silent)).all()
    assert np.abs(slope(0.5 * real)).max() > 0


def test_what_is_wrong_in_silence_weighs_little():
    """A hiss at -90 dB is far from silence by its logarithm alone."""
    hiss = 1.5e-4 * waves()[0]
    silence = np.zeros_like(hiss)
    logs = [np.mean([np.abs(np.log(magnitude(a, *r) / 1e-7**0.5)).mean() for r in RESOLUTIONS]) for a in hiss]
    assert min(logs) > 0.3
    np.testing.assert_allclose(stft_distance(jnp.asarray(hiss), jnp.asarray(silence)), logs, atol=0.1)


def test_audio_shorter_than_every_window():
    made, real = (jnp.asarray(wave) for wave in waves(1, 500))
    assert np.isfinite(stft_distance(made, real)).all()
