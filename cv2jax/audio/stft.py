"""Framing and power spectra of padded batches: every row reflects at its own end, so padding never matters."""

import functools
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from cv2jax.audio.arrays import array_namespace, as_float, matmul
from cv2jax.shapes import Bool, Float, Int

ArrayOrNumpy = jax.Array | np.ndarray
DftKind = Literal["auto", "fft", "matmul"]

# Points, hop and window, in samples, of the multi-resolution STFT distance of Parallel WaveGAN (Yamamoto et al. 2020, 2.2),
# and the least power that its logarithm sees, as in the paper's code.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
LEAST_POWER = 1e-7


def trim_rows(
    waveform: Float[ArrayOrNumpy, "B W"], num_samples: Int[ArrayOrNumpy, " B"] | None
) -> tuple[Float[ArrayOrNumpy, "B W"], Int[ArrayOrNumpy, " B"]]:
    """Return `waveform [B W]` with whatever lies behind each row's end set to zero (NaN too), and `num_samples [B]`.

    `num_samples` None means whole rows; counts outside 0..W are clipped.
    """
    xp = array_namespace(waveform, num_samples)
    waveform = as_float(xp, waveform)
    rows, width = waveform.shape
    if num_samples is None:
        return waveform, xp.full((rows,), width, dtype=np.int32)
    num_samples = xp.clip(xp.asarray(num_samples).astype(np.int32), 0, width)
    return xp.where(row_mask(num_samples, width), waveform, xp.zeros((), waveform.dtype)), num_samples


def row_mask(counts: Int[ArrayOrNumpy, " B"], width: int) -> Bool[ArrayOrNumpy, "B width"]:
    """Return `[B width]`, True at the first `counts[b]` positions of row b."""
    xp = array_namespace(counts)
    return xp.arange(width, dtype=np.int32)[None, :] < counts[:, None]


def reflect_pad(
    waveform: Float[ArrayOrNumpy, "B W"], num_samples: Int[ArrayOrNumpy, " B"], pad: int
) -> Float[ArrayOrNumpy, "B P"]:
    """Mirror `pad` samples before each row and behind its own end: `[B W]` → `[B W+2·pad]`, zeros from there on.

    `waveform` comes from `trim_rows`. Rows shorter than `pad` are mirrored again and again, as `np.pad` does.
    """
    xp = array_namespace(waveform, num_samples)
    rows, width = waveform.shape
    if width == 0:
        return xp.zeros((rows, 2 * pad), waveform.dtype)
    steps = np.arange(1, pad + 1, dtype=np.int32)[None, :]
    last = xp.maximum(num_samples - 1, 0)[:, None]
    head = xp.take_along_axis(waveform, _mirror(xp, -steps[:, ::-1], last), axis=1)
    tail = xp.take_along_axis(waveform, _mirror(xp, last + steps, last), axis=1)
    padded = xp.concatenate([head, waveform, xp.zeros_like(tail)], axis=1)
    start = pad + num_samples
    if xp is np:
        np.put_along_axis(padded, np.asarray(start[:, None] + steps - 1), tail, axis=1)
        return padded
    # One window a row: a scatter of windows, where an index for each sample would crawl on a TPU.
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(padded, tail, start)


def _mirror(xp: ModuleType, index: Any, last: Any) -> Any:
    """Fold an index of any size into 0..last by reflection at both ends."""
    period = xp.maximum(2 * last, 1)
    folded = index % period
    return xp.minimum(xp.minimum(folded, period - folded), last)


def frame(
    waveform: Float[ArrayOrNumpy, "B W"], frame_length: int, hop_length: int, num_frames: int
) -> Float[ArrayOrNumpy, "B F N"]:
    """Cut `[B W]` into `num_frames` overlapping frames `[B F N]`, N = `frame_length`, by reshapes and slices alone."""
    xp = array_namespace(waveform)
    if num_frames <= 0:
        return xp.zeros((waveform.shape[0], 0, frame_length), waveform.dtype)
    pieces = -(-frame_length // hop_length)
    total = (num_frames + pieces - 1) * hop_length
    missing = total - waveform.shape[1]
    if missing > 0:
        waveform = xp.pad(waveform, ((0, 0), (0, missing)))
    blocks = waveform[:, :total].reshape(waveform.shape[0], -1, hop_length)
    slices = [blocks[:, piece : piece + num_frames] for piece in range(pieces)]
    slices[-1] = slices[-1][:, :, : frame_length - (pieces - 1) * hop_length]
    return xp.concatenate(slices, axis=-1)


@functools.lru_cache(maxsize=16)
def hann_window(length: int) -> Float[np.ndarray, " N"]:
    """Return the periodic Hann window `[N]` in float64, as `torch.hann_window` defines it."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    window.setflags(write=False)  # cached: nobody may change it
    return window


@functools.lru_cache(maxsize=8)
def _dft_matrix(frame_length: int, num_points: int, dtype: str) -> np.ndarray:
    """Return `[N 2·K]`: cosines, then sines, of the K = num_points/2+1 frequencies; N may be less than num_points."""
    bins = np.arange(num_points // 2 + 1)
    # The product is reduced to one turn as an integer, else the angle would lose digits.
    angle = 2 * np.pi / num_points * (np.arange(frame_length)[:, None] * bins[None, :] % num_points)
    return np.concatenate([np.cos(angle), -np.sin(angle)], axis=1).astype(dtype)


def power_spectrum(
    frames: Float[ArrayOrNumpy, "B F N"], num_points: int, dft: DftKind = "auto"
) -> Float[ArrayOrNumpy, "B F K"]:
    """Return |DFT|² of windowed frames `[B F N]` (zero-padded to `num_points`): `[B F K]`, K = num_points/2 + 1.

    `dft`: "fft", "matmul" (a product with the DFT matrix), or "auto": the FFT on a CPU, the matrix on accelerators,
    decided for the platform the program is lowered for. A TPU's FFT is slow at sizes such as 400 and 1920, a sharded
    GPU's gathers the whole batch first (spec/jax_practice.md 2.9); the product is a trifle there and stays sharded.
    """
    xp = array_namespace(frames)
    if frames.shape[1] == 0:
        return xp.zeros((*frames.shape[:2], num_points // 2 + 1), frames.dtype)

    def by_fft(frames: Any) -> Any:
        spectrum = xp.fft.rfft(frames, n=num_points, axis=-1)
        return (spectrum.real**2 + spectrum.imag**2).astype(frames.dtype)

    def by_matmul(frames: Any) -> Any:
        matrix = xp.asarray(_dft_matrix(frames.shape[-1], num_points, str(frames.dtype)))
        real, imag = xp.split(matmul(xp, frames, matrix), 2, axis=-1)
        return real**2 + imag**2

    if dft == "auto":
        return by_fft(frames) if xp is np else jax.lax.platform_dependent(frames, cpu=by_fft, default=by_matmul)
    return by_fft(frames) if dft == "fft" else by_matmul(frames)
