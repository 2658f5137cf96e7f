"""The short Fourier transforms against librosa's in float64, at the ends of short signals, and in chunks."""

import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from cv2jax.models.hift_vocoder.istft import istft, stft
from cv2jax.nn.signal import Signal, Whole
from tests.nn.chunked import Chunked, alone, whole

POINTS = [8, 16]
LENGTHS = [5, 1, 3]  # frames of three hops of a quarter


def make_samples(num: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, num, 1), np.float32)


def slow_stft(samples: np.ndarray, points: int) -> np.ndarray:
    padded = np.pad(samples.astype(np.float64), points // 2, mode="reflect")
    spectrum = librosa.stft(padded, n_fft=points, hop_length=points // 4, window="hann", center=False)
    return np.concatenate([spectrum.real, spectrum.imag]).T


def slow_istft(parts: np.ndarray, points: int) -> np.ndarray:
    real, imaginary = np.split(parts.T.astype(np.float64), 2)
    num = (parts.shape[0] - 1) * (points // 4)
    return librosa.istft(real + 1j * imaginary, hop_length=points // 4, n_fft=points, window="hann", length=num)


def forward(points):
    return lambda extent, signal: stft(extent, signal, points)


def backward(points):
    def apply(extent, signal):
        """Of a frame more than the signal has, as the generator's last stage makes."""
        return istft(extent, extent.mask(extent.reflect_start(signal)), points)

    return apply


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("num_hops", [3, 50])
def test_forwards_is_librosas(points, num_hops):
    rate = points // 4 * num_hops
    samples = make_samples(rate)[0]
    got = alone(forward(points), samples, rate)
    assert got.shape == (num_hops + 1, points + 2)
    np.testing.assert_allclose(got, slow_stft(samples[:, 0], points), rtol=0, atol=1e-5)


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("num_hops", [1, 2, 50])
def test_backwards_is_librosas(points, num_hops):
    """Of any spectrum, consistent or not; the imaginary parts of 0 Hz and Nyquist say nothing."""
    parts = np.random.default_rng(1).standard_normal((1, num_hops + 1, points + 2), np.float32)
    got = istft(Whole(), Signal(jnp.asarray(parts), num_hops, extra=1), points).values[0, :, 0]
    assert got.shape == (points // 4 * num_hops,)
    np.testing.assert_allclose(got, slow_istft(parts[0], points), rtol=0, atol=1e-5)


@pytest.mark.parametrize("points", POINTS)
def test_backwards_undoes_forwards(points):
    rate = points // 4 * 6
    samples = make_samples(5 * rate, rows=2)
    back = istft(Whole(), stft(Whole(), Signal(jnp.asarray(samples), rate), points), points)
    assert (back.rate, back.extra) == (rate, 0)
    np.testing.assert_allclose(back.values, samples, rtol=0, atol=1e-5)


@pytest.mark.parametrize("points", POINTS)
def test_forwards_streams_and_batches(points):
    rate = 3 * points // 4
    values = make_samples(rate * max(LENGTHS), len(LENGTHS))
    together, out = whole(forward(points), values, rate, LENGTHS)
    assert (out.rate, out.extra) == (3, 1)
    chunked = Chunked(forward(points), rate, block=2)
    streams = [chunked(values, LENGTHS, seed) for seed in range(5)]
    assert chunked.delay == 1  # a frame ends half a window, two hops, after the start of its own
    for row, length in enumerate(LENGTHS):
        want = slow_stft(values[row, : rate * length, 0], points)
        np.testing.assert_allclose(together[row], want, rtol=0, atol=1e-5)
        for made in streams:
            np.testing.assert_allclose(made[row], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("points", POINTS)
def test_backwards_streams_and_batches(points):
    rate = 3
    values = np.random.default_rng(2).standard_normal((3, rate * max(LENGTHS), points + 2), np.float32)
    together, out = whole(backward(points), values, rate, LENGTHS)
    assert (out.rate, out.extra) == (rate * points // 4, 0)
    chunked = Chunked(backward(points), rate, block=2)
    streams = [chunked(values, LENGTHS, seed) for seed in range(5)]
    for row, length in enumerate(LENGTHS):
        alone_ = values[row, : rate * length]
        want = slow_istft(np.concatenate([alone_[1:2], alone_]), points)
        np.testing.assert_allclose(together[row][:, 0], want, rtol=0, atol=1e-5)
        for made in streams:
            np.testing.assert_allclose(made[row][:, 0], want, rtol=0, atol=1e-5)


def test_no_end_is_louder_than_the_middle():
    """Overlap-add is divided by the windows that are there, one of four at the very ends."""
    ones = np.zeros((1, 31, 18), np.float32)
    ones[..., 0] = 8  # a constant of 1: half the points, as the window's mean is a half
    got = np.asarray(istft(Whole(), Signal(jnp.asarray(ones), 30, extra=1), 16).values[0, :, 0])
    np.testing.assert_allclose(got, slow_istft(ones[0], 16), rtol=0, atol=1e-6)
    assert np.isfinite(got).all()
    assert got.max() < 1.2
