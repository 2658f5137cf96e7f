"""Windowed-sinc resampling, equal to `torchaudio.transforms.Resample` with its defaults, in numpy and inside jit."""

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np

from cv2jax.audio.arrays import array_namespace, as_float, matmul
from cv2jax.config import UserError
from cv2jax.shapes import Float

_ZEROS = 6  # lowpass_filter_width: zero crossings of the sinc on either side
_ROLLOFF = 0.99  # cutoff as a share of the lower Nyquist frequency
_MIN_BLOCK = 64  # samples a matrix row covers at least: smaller products waste the multiplier
_MAX_PERIOD = 2048  # longest period (samples in or out) whose dense filter bank is kept


def resampled_length(num_samples: Any, from_hz: int, to_hz: int) -> Any:
    """Return `ceil(num_samples · to_hz / from_hz)`, for ints and integer arrays alike (without 32-bit overflow)."""
    down, up = _ratio(from_hz, to_hz)
    # num·up overflows int32 from 75 s on for 441/480-like ratios, so whole periods and the remainder go apart.
    return num_samples // down * up + -(-(num_samples % down * up) // down)


def resample(waveform: Float[Any, "*batch W"], from_hz: int, to_hz: int) -> Float[Any, "*batch V"]:
    """Resample the last axis, `[... W]` at `from_hz` to `[... ceil(W·to_hz/from_hz)]` at `to_hz`.

    Samples outside the waveform count as zero, so a row padded with zeros equals the row alone over its
    `resampled_length` (behind it the filter rings on for a few samples). Numpy in, numpy out; jax in, jax out, also
    under jit. Float64 stays float64. Source: torchaudio `functional.resample` (sinc_interp_hann, width 6, rolloff 0.99).
    Raises UserError for a rate that is not positive.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise UserError(f"cannot resample from {from_hz} Hz to {to_hz} Hz: both rates must be above 0")
    xp = array_namespace(waveform)
    waveform = as_float(xp, waveform)
    down, up = _ratio(from_hz, to_hz)
    num_samples = waveform.shape[-1]
    if down == up or num_samples == 0:
        return waveform
    run = _resample_dense if max(down, up) <= _MAX_PERIOD else _resample_banded
    flat = run(xp, waveform.reshape(-1, num_samples), down, up)
    return flat[:, : resampled_length(num_samples, down, up)].reshape(*waveform.shape[:-1], -1)


def _ratio(from_hz: int, to_hz: int) -> tuple[int, int]:
    """Return (down, up), the two rates without their common divisor."""
    divisor = math.gcd(from_hz, to_hz)
    return from_hz // divisor, to_hz // divisor


def _half_width(down: int, up: int) -> int:
    """Return the reach of the filter to either side, in input samples."""
    return math.ceil(_ZEROS * down / (min(down, up) * _ROLLOFF))


def _filter_value(offset: np.ndarray, down: int, up: int) -> np.ndarray:
    """Evaluate the windowed sinc in float64, `offset` being a distance in periods (`down` input samples each)."""
    cutoff = min(down, up) * _ROLLOFF
    crossings = np.clip(offset * cutoff, -_ZEROS, _ZEROS)
    return np.sinc(crossings) * np.cos(crossings * np.pi / _ZEROS / 2) ** 2 * (cutoff / down)


def _blocks(xp: ModuleType, waveform: Any, block: int, half: int) -> Any:
    """Cut `[R W]` into `[R blocks+1 block]`, with `half` zeros in front and zeros up to a whole block behind."""
    rows, num_samples = waveform.shape
    total = (-(-num_samples // block) + -(-2 * half // block)) * block
    if xp is np:
        padded = np.zeros((rows, total), waveform.dtype)
        padded[:, half : half + num_samples] = waveform
    else:
        padded = xp.pad(waveform, ((0, 0), (half, total - half - num_samples)))
    return padded.reshape(rows, -1, block)


@functools.lru_cache(maxsize=32)
def _dense_bank(down: int, up: int, dtype: str) -> tuple[np.ndarray, int]:
    """Return the matrix `[block+2·half, outputs]` that turns one block and its surroundings into outputs, and `block`.

    A block holds as many periods as make its matrix product wide enough to be fast, and at least 2·half samples, so
    that the surroundings of a block never reach past the next one.
    """
    half = _half_width(down, up)
    repeats = -(-max(_MIN_BLOCK, 2 * half) // down)
    taps = np.arange(-half, half + repeats * down)[:, None] / down
    phases = np.arange(repeats * up)[None, :] / up
    return _filter_value(taps - phases, down, up).astype(dtype), repeats * down


def _resample_dense(xp: ModuleType, waveform: Any, down: int, up: int) -> Any:
    """Resample `[R W]` as two matrix products a block: the block itself, and the head of the next.

    Some 10 times more multiplications than the polyphase minimum, but dense, without framing copies or gathers: on
    a CPU this runs at BLAS speed and on an accelerator in the matrix unit.
    """
    half = _half_width(down, up)
    bank, block = _dense_bank(down, up, str(waveform.dtype))
    blocks = _blocks(xp, waveform, block, half)
    bank = xp.asarray(bank)
    output = matmul(xp, blocks[:, :-1], bank[:block])
    tail = matmul(xp, blocks[:, 1:, : 2 * half], bank[block:])
    output = np.add(output, tail, out=output) if xp is np else output + tail
    return output.reshape(waveform.shape[0], -1)


@functools.lru_cache(maxsize=8)
def _banded_bank(down: int, up: int, dtype: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return for each output of a block its first input sample `[O]` and its taps `[2·half+1, O]`, and the block."""
    half = _half_width(down, up)
    repeats = max(1, -(-2 * half // down))
    phases = np.arange(repeats * up)
    starts = phases * down // up
    taps = starts[None, :] + np.arange(-half, half + 1)[:, None]
    return starts, _filter_value(taps / down - phases[None, :] / up, down, up).astype(dtype), repeats * down


def _resample_banded(xp: ModuleType, waveform: Any, down: int, up: int) -> Any:
    """Resample `[R W]` tap by tap: for odd rates (22,051 Hz) whose dense filter bank would fill gigabytes."""
    half = _half_width(down, up)
    starts, bank, block = _banded_bank(down, up, str(waveform.dtype))
    blocks = _blocks(xp, waveform, block, half)
    windows = xp.concatenate([blocks[:, :-1], blocks[:, 1:, : 2 * half]], axis=-1)
    output = xp.zeros((*windows.shape[:2], len(starts)), waveform.dtype)
    for tap in range(2 * half + 1):
        output = output + xp.take(windows, starts + tap, axis=-1) * bank[tap]
    return output.reshape(waveform.shape[0], -1)
