"""The two log-mel spectrograms of CosyVoice 2: Whisper's 128 bins at 16 kHz and the flow's 80 bins at 24 kHz."""

import dataclasses
import functools

import numpy as np

from cv2jax.audio.arrays import array_namespace, matmul
from cv2jax.audio.stft import (
    ArrayOrNumpy,
    DftKind,
    frame,
    hann_window,
    power_spectrum,
    reflect_pad,
    row_mask,
    trim_rows,
)
from cv2jax.shapes import Float, Int

WHISPER_RATE_HZ = 16000
WHISPER_FFT = 400
WHISPER_HOP = 160
WHISPER_BINS = 128

MEL_RATE_HZ = 24000
MEL_FFT = 1920
MEL_HOP = 480
MEL_BINS = 80
MEL_MARGIN = (MEL_FFT - MEL_HOP) // 2  # samples that the first frame sees before the audio, and the last behind it
MEL_FMAX_HZ = 8000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MelDefinition:
    """What a log-mel is of: models that read one record it, and refuse another."""

    rate_hz: int = MEL_RATE_HZ
    num_mels: int = MEL_BINS
    mel_fft: int = MEL_FFT  # points of the window and of the transform
    mel_hop: int = MEL_HOP  # samples
    mel_fmax_hz: float = MEL_FMAX_HZ


FLOW_MEL = MelDefinition()  # what `mel_spectrogram` makes, and the flow


@functools.lru_cache(maxsize=8)
def mel_filters(rate_hz: int, num_points: int, num_bins: int, fmax: float | None) -> Float[np.ndarray, "M K"]:
    """Return librosa's mel filterbank `[M K]` (Slaney scale and area norm, from 0 Hz to `fmax` Hz or Nyquist)."""
    import librosa  # only where a mel is made: what reads voices does without it

    filters = librosa.filters.mel(sr=rate_hz, n_fft=num_points, n_mels=num_bins, fmin=0.0, fmax=fmax)
    filters.setflags(write=False)  # cached: nobody may change it
    return filters


def log_mel_whisper(
    waveform: Float[ArrayOrNumpy, "B W"], num_samples: Int[ArrayOrNumpy, " B"] | None = None, *, dft: DftKind = "auto"
) -> tuple[Float[ArrayOrNumpy, "B M F"], Int[ArrayOrNumpy, " B"]]:
    """Return Whisper's log-mel `[B 128 F]` of 16 kHz audio `[B W]` and `num_frames [B]` = num_samples // 160.

    F = W // 160. Each row is reflected at its own end and floored 8 below its own maximum, so what lies behind
    `num_samples` changes nothing; frames that are not valid are 0. Source: whisper `log_mel_spectrogram`
    (spec/frontends.md 1.1). Numpy in, numpy out; jax in, jax out, also under jit.
    """
    xp = array_namespace(waveform, num_samples)
    waveform, num_samples = trim_rows(waveform, num_samples)
    padded = reflect_pad(waveform, num_samples, WHISPER_FFT // 2)
    mel, num_frames, mask = _mel(
        padded, num_samples, WHISPER_HOP, hann_window(WHISPER_FFT), _whisper_filters(), waveform.shape[1], dft
    )
    log_mel = xp.log10(xp.maximum(mel, 1e-10))
    # -10 is the least value there is, so that frames that are not valid never win the maximum.
    row_max = xp.max(xp.where(mask, log_mel, -10.0), axis=(1, 2), keepdims=True, initial=-10.0)
    log_mel = (xp.maximum(log_mel, row_max - 8.0) + 4.0) / 4.0
    return xp.where(mask, log_mel, 0.0).astype(waveform.dtype), num_frames


def mel_spectrogram(
    waveform: Float[ArrayOrNumpy, "B W"],
    num_samples: Int[ArrayOrNumpy, " B"] | None = None,
    *,
    fmax: float | None = MEL_FMAX_HZ,
    dft: DftKind = "auto",
) -> tuple[Float[ArrayOrNumpy, "B M F"], Int[ArrayOrNumpy, " B"]]:
    """Return the flow's log-mel `[B 80 F]` of 24 kHz audio `[B W]` and `num_frames [B]` = num_samples // 480.

    F = W // 480; natural log of magnitudes, floored at 1e-5. `fmax` in Hz: 8000 for the model's input, None (Nyquist)
    for the vocoder's loss. Each row is reflected at its own end; frames that are not valid are 0.
    Source: Matcha-TTS `utils/audio.py` (spec/official.md 2.1). Numpy in, numpy out; jax in, jax out, also under jit.
    """
    waveform, num_samples = trim_rows(waveform, num_samples)
    padded = reflect_pad(waveform, num_samples, MEL_MARGIN)
    return _flow_mel(padded, num_samples, waveform.shape[1], fmax, dft)


def mel_with_margins(
    waveform: Float[ArrayOrNumpy, "B P"], *, fmax: float | None = MEL_FMAX_HZ, dft: DftKind = "auto"
) -> Float[ArrayOrNumpy, "B M F"]:
    """Return `mel_spectrogram` of a cut from longer audio that brings what its frames see beyond it: 720 samples a side."""
    xp = array_namespace(waveform)
    width = waveform.shape[1] - 2 * MEL_MARGIN
    return _flow_mel(waveform, xp.full((waveform.shape[0],), width, dtype=np.int32), width, fmax, dft)[0]


def _flow_mel(
    padded: Float[ArrayOrNumpy, "B P"],
    num_samples: Int[ArrayOrNumpy, " B"],
    width: int,
    fmax: float | None,
    dft: DftKind,
) -> tuple[Float[ArrayOrNumpy, "B M F"], Int[ArrayOrNumpy, " B"]]:
    xp = array_namespace(padded)
    filters = mel_filters(MEL_RATE_HZ, MEL_FFT, MEL_BINS, fmax)
    options = (padded, num_samples, MEL_HOP, hann_window(MEL_FFT), filters, width, dft)
    mel, num_frames, mask = _mel(*options, magnitude=True)
    return xp.where(mask, xp.log(xp.maximum(mel, 1e-5)), 0.0).astype(padded.dtype), num_frames


def _whisper_filters() -> Float[np.ndarray, "M K"]:
    """Return Whisper's filterbank; librosa's is equal to the file whisper ships (spec/frontends.md 1.1)."""
    return mel_filters(WHISPER_RATE_HZ, WHISPER_FFT, WHISPER_BINS, None)


def _mel(
    padded: Float[ArrayOrNumpy, "B P"],
    num_samples: Int[ArrayOrNumpy, " B"],
    hop_length: int,
    window: Float[np.ndarray, " N"],
    filters: Float[np.ndarray, "M K"],
    width: int,
    dft: DftKind,
    *,
    magnitude: bool = False,
) -> tuple[Float[ArrayOrNumpy, "B M F"], Int[ArrayOrNumpy, " B"], ArrayOrNumpy]:
    """Return mel energies `[B M F]` of a reflected waveform, `num_frames [B]` and the frame mask `[B 1 F]`."""
    xp = array_namespace(padded)
    frames = frame(padded, len(window), hop_length, width // hop_length) * xp.asarray(window.astype(padded.dtype))
    spectrum = power_spectrum(frames, len(window), dft)
    if magnitude:
        spectrum = xp.sqrt(spectrum + 1e-9)  # the constant is part of the definition and bounds the slope at silence
    mel = matmul(xp, spectrum, xp.asarray(filters.T.astype(padded.dtype)))
    num_frames = num_samples // hop_length
    return xp.swapaxes(mel, 1, 2), num_frames, row_mask(num_frames, width // hop_length)[:, None, :]
