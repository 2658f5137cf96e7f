"""Fundamental frequency by normalised autocorrelation: cheap enough to run inside the train step, as a pitch loss's target."""

import functools

import numpy as np

from cv2jax.audio.arrays import array_namespace
from cv2jax.audio.stft import ArrayOrNumpy, frame, hann_window, row_mask, trim_rows
from cv2jax.shapes import Bool, Float, Int

MIN_HZ = 60.0
MAX_HZ = 500.0
WINDOW_SECONDS = 0.05  # three periods of the lowest pitch
VOICING_THRESHOLD = 0.45
SILENCE_THRESHOLD = 0.03  # of the row's loudest frame, in amplitude
OCTAVE_COST = 0.01  # prefers the shorter of two periods that fit equally well


def pitch_track(
    waveform: Float[ArrayOrNumpy, "B W"], num_samples: Int[ArrayOrNumpy, " B"] | None, rate_hz: int, hop_length: int
) -> tuple[Float[ArrayOrNumpy, "B L"], Bool[ArrayOrNumpy, "B L"]]:
    """Return `f0 [B L]` in Hz (0 where unvoiced) and the mask of frames that hold speech, L = ceil(W / hop_length).

    Frame l is centred on sample (l + ½)·hop_length. The autocorrelation of the windowed frame is divided by the window's
    own (Boersma 1993, "Accurate short-term analysis of the fundamental frequency"), its best peak between 60 and 500 Hz
    is refined by a parabola. What lies behind `num_samples` changes nothing. Numpy in, numpy out; jax in, jax out.
    """
    xp = array_namespace(waveform, num_samples)
    waveform, num_samples = trim_rows(waveform, num_samples)
    size = 2 * round(WINDOW_SECONDS * rate_hz / 2)
    num_frames = -(-waveform.shape[1] // hop_length)
    # Zero padding centres the first window on the middle of the first hop; a negative pad would cut into it.
    left = max(size // 2 - hop_length // 2, 0)
    shift = max(hop_length // 2 - size // 2, 0)
    padded = xp.pad(waveform[:, shift:], ((0, 0), (left, size)))
    frames = frame(padded, size, hop_length, num_frames)
    frames = frames - xp.mean(frames, axis=-1, keepdims=True)
    window, own = _window(size)
    spectrum = xp.fft.rfft(frames * xp.asarray(window.astype(waveform.dtype)), n=2 * size, axis=-1)
    power = xp.real(spectrum) ** 2 + xp.imag(spectrum) ** 2
    shortest, longest = int(rate_hz / MAX_HZ), int(rate_hz / MIN_HZ) + 1
    correlation = xp.fft.irfft(power, n=2 * size, axis=-1)[..., : longest + 2]
    energy = correlation[..., :1]
    normal = correlation / xp.maximum(energy, 1e-10) / xp.asarray(own[: longest + 2].astype(waveform.dtype))
    lags = np.arange(shortest, longest + 1)
    cost = (OCTAVE_COST * np.log2(MIN_HZ * lags / rate_hz)).astype(waveform.dtype)
    middle, before, after = (normal[..., shortest + d : longest + 1 + d] for d in (0, -1, 1))
    is_peak = (middle >= before) & (middle > after)
    best = xp.argmax(xp.where(is_peak, middle - xp.asarray(cost), -2.0), axis=-1)[..., None]
    top, low, high = (xp.take_along_axis(a, best, axis=-1)[..., 0] for a in (middle, before, after))
    bend = xp.minimum(low - 2 * top + high, -1e-9)
    lag = (best[..., 0] + shortest) + 0.5 * (low - high) / bend
    mask = row_mask((num_samples + hop_length - 1) // hop_length, num_frames)
    amplitude = xp.sqrt(xp.maximum(energy[..., 0], 0.0))
    loud = amplitude > SILENCE_THRESHOLD * xp.max(amplitude, axis=-1, keepdims=True, initial=1e-5)
    voiced = (top > VOICING_THRESHOLD) & loud & mask & xp.any(is_peak, axis=-1)
    f0 = xp.clip(rate_hz / xp.maximum(lag, 1.0), MIN_HZ, MAX_HZ)
    return xp.where(voiced, f0, 0.0).astype(waveform.dtype), mask


@functools.lru_cache(maxsize=8)
def _window(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The analysis window and its own normalised autocorrelation, floored where almost nothing of it is left."""
    window = hann_window(size)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, 2 * size)) ** 2)[:size]
    return window, np.maximum(own / own[0], 1e-3)
