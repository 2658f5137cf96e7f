"""Reading, checking and writing audio files; imports no jax, so that data workers stay light."""

import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import soundfile

from cv2jax.audio.resample import resample
from cv2jax.audio.tar import read_tar_member, split_tar_source
from cv2jax.config import UserError
from cv2jax.shapes import Float, Float32, Int16


@runtime_checkable
class ByteStream(Protocol):
    """Anything that `read()`s bytes: an open file, a BytesIO, a response."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all of them if negative."""
        ...


AudioSource = str | Path | bytes | ByteStream
MIN_RATE_HZ = 8000
MAX_RATE_HZ = 768_000  # of the fastest converters: a header that states more is wrong

_FULL_SCALE = 32767 / 32768  # the loudest positive 16-bit sample
_CLIPPED_SHARE = 1e-3
_SILENT_PEAK = 10 ** (-50 / 20)
_SILENT_RMS = 10 ** (-70 / 20)
_SHORT_SECONDS = 0.1
_MISSING_SHARE = 0.05
_UNKNOWN_LENGTH = 1 << 40  # a FLAC written to a pipe claims even more samples than this
_UNKNOWN_BYTES = (1 << 31) - 4096  # and a WAV written to a pipe, about this many bytes or more
_STATED_BYTES = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_DECODE_ERRORS = (soundfile.SoundFileError, TypeError, ValueError, MemoryError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioClip:
    """One decoded audio file: `waveform [W]`, mono in [-1, 1] at `rate_hz`, and what the file held before downmixing.

    `peak` is the largest magnitude in the file (above 1 only in float or lossy files, whose waveform is then scaled
    down to 1), `clipped_share` the share of its samples at full scale, `missing_share` how much of the length that an MP3
    states is not there.
    """

    name: str
    waveform: Float32[np.ndarray, " W"]
    rate_hz: int
    num_channels: int
    peak: float
    clipped_share: float
    missing_share: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the duration in seconds."""
        return len(self.waveform) / self.rate_hz


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioWarning:
    """Something odd about a usable clip: its kind, for counting, and a sentence for the report."""

    kind: Literal["clipping", "overload", "silence", "short", "truncated"]
    message: str


def read_audio(source: AudioSource) -> AudioClip:
    """Decode a WAV, FLAC, OGG or MP3 (whatever libsndfile knows) and average its channels.

    `source` is a path, `archive.tar::member`, the bytes of a file, or a binary file object. Raises UserError if it is
    missing, cannot be decoded, or ends before the length it states. What it holds is judged by `check_audio`.
    """
    name = _source_name(source)
    stream = _open_source(source, name)
    try:
        with _ForwardFile(stream) as sound:
            samples = _decode(sound)
            missing = _missing_share(sound, len(samples))
            rate_hz, container = sound.samplerate, sound.format
    except _DECODE_ERRORS as error:
        reason = getattr(error, "error_string", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: cannot decode the audio ({reason.rstrip('. ')}); replace the file") from None
    # Without its optional header an MP3's length is an estimate: too little to refuse it.
    if missing > 0 and container != "MP3":
        raise UserError(f"{name}: cut short, {100 * missing:.2g} % of its audio is missing; copy the file again")
    peak = max(float(samples.max()), -float(samples.min())) if samples.size else 0.0
    clipped = np.count_nonzero(np.abs(samples) >= _FULL_SCALE) / samples.size if peak >= _FULL_SCALE else 0.0
    waveform = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if 1.0 < peak < np.inf:
        waveform = waveform / np.float32(peak)
    return AudioClip(
        name=name,
        waveform=np.ascontiguousarray(waveform),
        rate_hz=rate_hz,
        num_channels=samples.shape[1],
        peak=peak,
        clipped_share=clipped,
        missing_share=missing,
    )


def check_audio(clip: AudioClip) -> tuple[AudioWarning, ...]:
    """Refuse what cannot be used and return warnings for what can but is odd.

    Raises UserError for a clip without samples, with NaN or infinite samples, below 8 kHz or above 768 kHz. Warns of
    clipping (over 0.1 % of samples at full scale), overload (a peak above 1), silence (peak under -50 dBFS or RMS under
    -70 dBFS) and clips shorter than 0.1 s, and MP3s that lack over 5 % of the length they state.
    """
    if clip.rate_hz < MIN_RATE_HZ:
        raise UserError(f"{clip.name}: sampled at {clip.rate_hz} Hz; at least {MIN_RATE_HZ} Hz is needed")
    if clip.rate_hz > MAX_RATE_HZ:
        raise UserError(f"{clip.name}: states {clip.rate_hz} Hz; at most {MAX_RATE_HZ} Hz is real, mend its header")
    if len(clip.waveform) == 0:
        raise UserError(f"{clip.name}: holds no samples; remove it from the list or record it again")
    if not (np.isfinite(clip.peak) and np.isfinite(clip.waveform).all()):
        raise UserError(f"{clip.name}: holds NaN or infinite samples; write the file again")
    warnings = []
    if clip.peak > 1.0:
        warnings.append(AudioWarning(kind="overload", message=f"peak {clip.peak:.3g} exceeds 1; scaled down to it"))
    elif clip.clipped_share > _CLIPPED_SHARE:
        message = f"{100 * clip.clipped_share:.2f} % of the samples are at full scale"
        warnings.append(AudioWarning(kind="clipping", message=message))
    rms = float(np.sqrt(np.mean(np.square(clip.waveform), dtype=np.float64)))
    if clip.peak < _SILENT_PEAK or rms < _SILENT_RMS:
        message = f"nearly silent: peak {_decibels(clip.peak)} dBFS, RMS {_decibels(rms)} dBFS"
        warnings.append(AudioWarning(kind="silence", message=message))
    if clip.seconds < _SHORT_SECONDS:
        warnings.append(AudioWarning(kind="short", message=f"lasts only {1000 * clip.seconds:.3g} ms"))
    if clip.missing_share > _MISSING_SHARE:
        message = f"{100 * clip.missing_share:.0f} % of the stated length is missing"
        warnings.append(AudioWarning(kind="truncated", message=message))
    return tuple(warnings)


def convert_rate(clip: AudioClip, rate_hz: int) -> Float32[np.ndarray, " W"]:
    """Return the clip's waveform `[W]` at `rate_hz`, scaled down where resampling overshoots full scale."""
    waveform = resample(clip.waveform, clip.rate_hz, rate_hz)
    peak = float(np.max(np.abs(waveform), initial=0.0))
    # Source: the official training pipeline divides by the peak rather than clip (spec/official.md 7.2).
    return waveform / np.float32(peak) if peak > 1.0 else waveform


def load_waveform(source: AudioSource, rate_hz: int) -> Float32[np.ndarray, " W"]:
    """Read, check and resample audio: mono float32 `[W]` in [-1, 1] at `rate_hz`.

    `source` as for `read_audio`; raises UserError as `read_audio` and `check_audio` do, and drops the warnings.
    """
    clip = read_audio(source)
    check_audio(clip)
    return convert_rate(clip, rate_hz)


def to_int16(waveform: Float[np.ndarray, " W"]) -> Int16[np.ndarray, " W"]:
    """Round a waveform `[W]` in [-1, 1] to 16-bit samples (full scale 32768, as libsndfile reads them), clipping."""
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def write_wav(path: str | Path, waveform: Float[np.ndarray, " W"], rate_hz: int) -> None:
    """Write `waveform [W]` in [-1, 1] as a mono 16-bit WAV; samples outside are clipped.

    Raises UserError for NaN or infinite samples (nothing is written then) and for a path that cannot be written.
    """
    if not np.isfinite(waveform).all():
        raise UserError(f"{path}: not written, the waveform holds NaN or infinite samples")
    try:
        Path(path).write_bytes(encode_wav(waveform, rate_hz))
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); check the folder") from None


def encode_wav(waveform: Float[np.ndarray, " W"], rate_hz: int) -> bytes:
    """The bytes of `waveform [W]` in [-1, 1] as a mono 16-bit WAV; samples outside are clipped."""
    stream = io.BytesIO()
    soundfile.write(stream, to_int16(waveform), rate_hz, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _source_name(source: AudioSource) -> str:
    """Return what to call `source` in messages."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def _open_source(source: AudioSource, name: str) -> Any:
    """Return what libsndfile can open: a path as bytes, or the content as a stream."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        return io.BytesIO(source.read())
    tar_source = split_tar_source(name)
    if tar_source is not None:
        return io.BytesIO(read_tar_member(*tar_source))
    if not os.path.exists(name):
        raise UserError(f"{name}: no such audio file; check the path")
    if not os.path.isfile(name):
        raise UserError(f"{name}: not a file; give the path of one audio file")
    if not os.access(name, os.R_OK):
        raise UserError(f"{name}: no permission to read it; change its mode")
    return os.fsencode(name)  # soundfile takes only UTF-8 as text


class _ForwardFile(soundfile.SoundFile):
    """A sound file read from front to back: soundfile's seek after each read fails where no length is stated."""

    def seekable(self) -> bool:
        """Return False, so that `read` never seeks."""
        return False


def _decode(sound: _ForwardFile) -> Float32[np.ndarray, "W channels"]:
    """Return all samples `[W channels]`, also of a stream that does not state its length."""
    if sound.frames < _UNKNOWN_LENGTH:
        return sound.read(sound.frames, dtype="float32", always_2d=True)
    pieces = [np.zeros((0, sound.channels), np.float32)]
    while len(piece := sound.read(1 << 20, dtype="float32", always_2d=True)):
        pieces.append(piece)
    return np.concatenate(pieces)


def _missing_share(sound: _ForwardFile, num_samples: int) -> float:
    """Return the share of the audio that the file states but does not hold, 0 where it states no length."""
    if num_samples < sound.frames < _UNKNOWN_LENGTH:
        return 1.0 - num_samples / sound.frames
    # libsndfile mends the length of a cut WAV or AIFF without a word, except in its log.
    stated = _STATED_BYTES.search(sound.extra_info)
    if stated is None:
        return 0.0
    expected, present = int(stated[1]), int(stated[2])
    # A few bytes are rounding (padding to an even count), not a cut.
    return 1.0 - present / expected if present + 16 < expected < _UNKNOWN_BYTES else 0.0


def _decibels(level: float) -> str:
    """Return a level as rounded decibels below full scale."""
    return f"{20 * np.log10(level):.0f}" if level > 0 else "-inf"
