"""Kaldi filterbank features, the input of the CAM++ speaker encoder."""

import functools

import numpy as np
from jaxtyping import Float, Int

from cv2jax.audio.arrays import array_namespace, matmul
from cv2jax.audio.stft import ArrayOrNumpy, DftKind, frame, power_spectrum, row_mask, trim_rows

FBANK_RATE_HZ = 16000
FBANK_FRAME = 400
FBANK_HOP = 160
FBANK_FFT = 512
FBANK_BINS = 80
_PREEMPHASIS = 0.97
_LOG_FLOOR = float(np.finfo(np.float32).eps)


@functools.cache
def kaldi_mel_filters() -> Float[np.ndarray, "M K"]:
    """Return Kaldi's `[80 257]` triangles, equally spaced in 1127·ln(1 + f/700) from 20 Hz to 8 kHz, peak 1."""

    def to_mel(frequency: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log(1.0 + frequency / 700.0)

    lowest, highest = to_mel(np.array([20.0, FBANK_RATE_HZ / 2]))
    edges = np.linspace(lowest, highest, FBANK_BINS + 2)
    left, centre, right = (edges[start : start + FBANK_BINS, None] for start in range(3))
    bins = to_mel(np.arange(FBANK_FFT // 2 + 1) * FBANK_RATE_HZ / FBANK_FFT)[None, :]
    filters = np.maximum(np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)), 0.0)
    filters[:, -1] = 0.0  # Kaldi leaves the Nyquist bin out
    filters.setflags(write=False)
    return filters


@functools.cache
def povey_window() -> Float[np.ndarray, " N"]:
    """Return Kaldi's window `[400]`, a symmetric Hann window to the power 0.85, in float64."""
    window = np.hanning(FBANK_FRAME) ** 0.85
    window.setflags(write=False)
    return window


def kaldi_fbank(
    waveform: Float[ArrayOrNumpy, "B W"],
    num_samples: Int[ArrayOrNumpy, " B"] | None = None,
    *,
    subtract_mean: bool = False,
    dft: DftKind = "auto",
) -> tuple[Float[ArrayOrNumpy, "B F M"], Int[ArrayOrNumpy, " B"]]:
    """Return Kaldi's log filterbank `[B F 80]` of 16 kHz audio `[B W]` in [-1, 1] and `num_frames [B]`.

    num_frames = 1 + (num_samples - 400) // 160, or 0 below 400 samples; F is the same of W. `subtract_mean` takes each
    row's mean over its own valid frames from every bin. Frames that are not valid are 0. No dither, no energy.
    Source: `torchaudio.compliance.kaldi.fbank` as CAM++ calls it (spec/frontends.md 2.1). Numpy in, numpy out; jax in,
    jax out, also under jit.
    """
    xp = array_namespace(waveform, num_samples)
    waveform, num_samples = trim_rows(waveform, num_samples)
    total = max(0, 1 + (waveform.shape[1] - FBANK_FRAME) // FBANK_HOP)
    frames = frame(waveform, FBANK_FRAME, FBANK_HOP, total)
    frames = frames - xp.mean(frames, axis=-1, keepdims=True)
    previous = xp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - _PREEMPHASIS * previous) * xp.asarray(povey_window().astype(waveform.dtype))
    power = power_spectrum(frames, FBANK_FFT, dft)
    energy = matmul(xp, power, xp.asarray(kaldi_mel_filters().T.astype(waveform.dtype)))
    log_energy = xp.log(xp.maximum(energy, _LOG_FLOOR))
    num_frames = xp.maximum(1 + (num_samples - FBANK_FRAME) // FBANK_HOP, 0)
    mask = row_mask(num_frames, total)[:, :, None]
    log_energy = xp.where(mask, log_energy, 0.0)
    if subtract_mean:
        counts = xp.maximum(num_frames, 1).astype(waveform.dtype)[:, None, None]
        log_energy = xp.where(mask, log_energy - xp.sum(log_energy, axis=1, keepdims=True) / counts, 0.0)
    return log_energy.astype(waveform.dtype), num_frames
