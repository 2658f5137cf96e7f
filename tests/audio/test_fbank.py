"""Kaldi filterbank: goldens, padding, mean removal, silence, jit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.fbank import kaldi_fbank

GOLDENS = Path(__file__).parents[1] / "goldens" / "features.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def noise(*shape: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dft", ["auto", "matmul"])
@pytest.mark.parametrize(("subtract_mean", "name"), [(False, "kaldi80"), (True, "kaldi80_cmn")])
def test_goldens(golden, convert, dft, subtract_mean, name):
    fbank, num_frames = kaldi_fbank(convert(golden["y16"]), subtract_mean=subtract_mean, dft=dft)
    assert num_frames.tolist() == [198]
    np.testing.assert_allclose(fbank[0], golden[name], atol=5e-4, rtol=0)


def test_float32_is_close_to_float64(golden):
    single, _ = kaldi_fbank(golden["y16"])
    double, _ = kaldi_fbank(golden["y16"].astype(np.float64))
    np.testing.assert_allclose(single, double, atol=5e-4, rtol=0)


@pytest.mark.parametrize("subtract_mean", [False, True])
def test_garbage_in_the_padding_changes_nothing(subtract_mean):
    counts = np.array([8000, 1600, 4321, 400, 399, 0], np.int32)
    clean = noise(6, 8000)
    garbage = clean.copy()
    for row, count in enumerate(counts):
        clean[row, count:], garbage[row, count:] = 0.0, np.nan
    expected, num_frames = kaldi_fbank(clean, counts, subtract_mean=subtract_mean)
    found, _ = jax.jit(kaldi_fbank, static_argnames="subtract_mean")(garbage, counts, subtract_mean=subtract_mean)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert num_frames.tolist() == [48, 8, 25, 1, 0, 0]
    for row, count in enumerate(counts):
        alone, _ = kaldi_fbank(clean[row : row + 1, :count], subtract_mean=subtract_mean)
        assert alone.shape[1] == num_frames[row]
        np.testing.assert_allclose(expected[row, : num_frames[row]], alone[0], atol=5e-4)
        np.testing.assert_array_equal(expected[row, num_frames[row] :], 0.0)


def test_mean_is_zero_over_each_row():
    counts = np.array([8000, 2000], np.int32)
    fbank, num_frames = kaldi_fbank(noise(2, 8000), counts, subtract_mean=True)
    for row in range(2):
        np.testing.assert_allclose(fbank[row, : num_frames[row]].mean(axis=0), 0.0, atol=1e-4)


@pytest.mark.parametrize("dft", ["fft", "matmul"])
def test_gradients_are_finite_at_silence(dft):
    waveform = jnp.zeros((2, 1600)).at[1].set(noise(1600))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(kaldi_fbank(x, jnp.array([1600, 900]), dft=dft)[0] ** 2)))(waveform)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient[1]).max()) > 0
    np.testing.assert_array_equal(gradient[1, 900:], 0.0)


def test_silence_lies_at_the_floor():
    fbank, _ = kaldi_fbank(np.zeros((1, 1600), np.float32))
    np.testing.assert_allclose(fbank, -15.942385, atol=1e-5)
