"""Resampling: torchaudio's goldens, its definition in float64, padding, jit, lengths."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio import resample as module
from cv2jax.audio.resample import resample, resampled_length
from cv2jax.config import UserError

GOLDENS = Path(__file__).parents[1] / "goldens" / "features.npz"
RATES = [(22050, 24000), (8000, 24000), (44100, 16000), (24000, 16000), (192000, 8000), (22051, 24000), (44101, 8000)]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def by_definition(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Sum the windowed sinc over all input samples, at each output's time, in float64."""
    cutoff = min(from_hz, to_hz) * 0.99
    times = np.arange(-(-len(waveform) * to_hz // from_hz)) / to_hz
    distance = np.clip((np.arange(len(waveform))[None, :] / from_hz - times[:, None]) * cutoff, -6, 6)
    return (np.sinc(distance) * np.cos(distance * np.pi / 12) ** 2 * cutoff / from_hz) @ waveform


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_goldens(golden, convert):
    up = resample(convert(golden["y16"]), 16000, 24000)
    down = resample(convert(golden["y24"]), 44100, 24000)
    assert isinstance(up, np.ndarray) == (convert is np.asarray)
    np.testing.assert_allclose(up, golden["y24_from16"], atol=1e-6)
    np.testing.assert_allclose(down, golden["y24_from44"], atol=1e-6)


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_definition_in_float64(from_hz, to_hz):
    waveform = np.random.default_rng(0).normal(size=801)
    np.testing.assert_allclose(resample(waveform, from_hz, to_hz), by_definition(waveform, from_hz, to_hz), atol=1e-9)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(22050, 24000), (44100, 16000), (24000, 16000), (192000, 8000)])
def test_tap_by_tap_equals_dense(from_hz, to_hz):
    waveform = np.random.default_rng(1).normal(size=(2, 3001))
    down, up = module._ratio(from_hz, to_hz)
    length = resampled_length(3001, from_hz, to_hz)
    dense = module._resample_dense(np, waveform, down, up)[:, :length]
    np.testing.assert_allclose(dense, module._resample_banded(np, waveform, down, up)[:, :length], atol=1e-12)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(22050, 24000), (24000, 16000), (22051, 24000)])
def test_jit_equals_numpy(from_hz, to_hz):
    waveform = np.random.default_rng(2).uniform(-1, 1, size=(2, 3, 4001)).astype(np.float32)
    traced = jax.jit(resample, static_argnums=(1, 2))(waveform, from_hz, to_hz)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, resample(waveform, from_hz, to_hz), atol=2e-6)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(22050, 24000), (24000, 16000), (22051, 24000)])
def test_zero_padding_changes_nothing(from_hz, to_hz):
    rng = np.random.default_rng(3)
    padded = np.zeros((3, 5000), np.float32)
    for row, count in enumerate((1, 800, 5000)):
        padded[row, :count] = rng.uniform(-1, 1, count)
        alone = resample(padded[row, :count], from_hz, to_hz)
        assert len(alone) == resampled_length(count, from_hz, to_hz)
        np.testing.assert_allclose(resample(padded, from_hz, to_hz)[row, : len(alone)], alone, atol=1e-6)


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_lengths_round_up(from_hz, to_hz):
    for count in (0, 1, 2, 79, 147, 148, 1000, 22050 * 600):
        exact = -(-count * to_hz // from_hz)
        assert resampled_length(count, from_hz, to_hz) == exact
        assert int(resampled_length(jnp.int32(count), from_hz, to_hz)) == exact
        if count <= 1000:
            assert resample(np.zeros((2, count), np.float32), from_hz, to_hz).shape == (2, exact)


def test_equal_rates_return_the_input():
    waveform = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(resample(waveform, 16000, 16000), waveform)


def test_gradient_is_the_transpose():
    waveform = jnp.zeros((1, 300))
    weights = np.random.default_rng(4).normal(size=(1, 450)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(resample(x, 16000, 24000) * weights))(waveform)
    impulse = np.zeros((1, 300), np.float32)
    impulse[0, 117] = 1.0
    np.testing.assert_allclose(gradient[0, 117], np.sum(resample(impulse, 16000, 24000) * weights), rtol=1e-4)


def test_rate_of_zero_is_refused():
    with pytest.raises(UserError, match="above 0"):
        resample(np.zeros(10, np.float32), 0, 16000)


def test_reading_and_resampling_import_no_jax():
    code = (
        "import sys, numpy, cv2jax.audio.io; from cv2jax.audio.resample import resample; "
        "resample(numpy.zeros(100, 'f4'), 16000, 24000); assert not {'jax', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
