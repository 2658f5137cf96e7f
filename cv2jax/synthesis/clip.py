"""Is a recording fit to be a voice's prompt? What can be heard without a recogniser, as plain findings with advice.

Errors are what no good voice can come of; warnings are what users of such systems learn too late: cut words, noise, level,
silence. Steady noise and gaps are told from speech by level and voicing; speech of several people, music under it and words
that are not those of the text are not noticed.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from cv2jax.audio.io import AudioClip, check_audio, convert_rate
from cv2jax.audio.pitch import pitch_track
from cv2jax.config import UserError
from cv2jax.shapes import Float, Float32

MIN_SECONDS, SHORT_SECONDS, LONG_SECONDS, MAX_SECONDS = 0.3, 2.0, 20.0, 30.0
_RATE_HZ = 16000  # at which a clip is measured
_FRAME, _HOP = 640, 320  # 40 ms every 20 ms
_BAND_HZ = (300.0, 3400.0)  # most of speech and little of hum, rumble and hiss
_LOUD_FRAMES = 12  # a quarter of a second
_EDGE_SECONDS = 0.01  # a period of a deep voice: a word that is cut is loud here, one that begins is not yet
_SILENCE_DB = 35.0  # this far below the loudest frames nothing of a word is
_FLOOR = 1e-12
_STEADY_DB, _NOISY_DB = 8.0, 16.0
# Words die away, but may start with a vowel at full level: the start has to be louder to be taken for a cut.
_START_DB, _END_DB, _ABOVE_NOISE_DB = 10.0, 20.0, 10.0
_QUIET_DBFS, _LOUD_DBFS = -38.0, -9.0
_FLAT_SHARE, _RUINED_SHARE = 1e-3, 0.05
_FLAT_LEVEL = 0.999  # of the peak
_MIN_VOICED = 0.1
_SAME_PEAK = 0.7  # of the loudest channel, of the mean of channels that are much alike
_MAX_SILENCE_SECONDS = 1.0
_LEAST_SPEECH_SECONDS = 0.15
# Letters a second of what people read aloud: far outside it, the text is of another recording.
_SLOWEST, _FASTEST = 3.0, 30.0
_WIDE_SLOWEST, _WIDE_FASTEST = 0.8, 12.0  # of scripts with a syllable or a word a letter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about a clip: an error (not fit) or a warning, its kind for counting, and a line with advice."""

    severity: Literal["error", "warning"]
    kind: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipMeasures:
    """What was measured; levels in dB below full scale (dBFS), or relative to the loudest frames (dB).

    Attributes:
      level_dbfs: RMS of the frames that are not silent. range_db: from the quiet to the loud frames between 300 and 3400 Hz.
      first_db, last_db: of the first and last 10 ms against the loudest frames. quiet_db: of the quietest frames against them.
      voiced_share: of the frames with speech level. first_speech, end_speech: seconds at which the sound starts and ends,
      equal where there is none. speech_seconds: without pauses.
    """

    level_dbfs: float
    range_db: float
    first_db: float
    last_db: float
    quiet_db: float
    voiced_share: float
    first_speech: float
    end_speech: float
    speech_seconds: float


def measure_clip(waveform: Float32[np.ndarray, " W"], rate_hz: int) -> ClipMeasures:
    """Measures a finite mono waveform [W] in [-1, 1] of 40 ms or more."""
    clip = AudioClip(name="", waveform=waveform, rate_hz=rate_hz, num_channels=1, peak=0.0, clipped_share=0.0)
    samples = convert_rate(clip, _RATE_HZ).astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(samples, _FRAME)[::_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_FRAME), axis=1)) ** 2
    hertz = np.fft.rfftfreq(_FRAME, 1 / _RATE_HZ)
    band = _decibels(power[:, (hertz >= _BAND_HZ[0]) & (hertz <= _BAND_HZ[1])].mean(axis=1))
    level = _decibels(np.square(frames).mean(axis=1))
    # Consonants such as s are weak in all but the high frequencies, which differences lift.
    high = _decibels(np.square(np.diff(frames, axis=1)).mean(axis=1))
    active = (level > _threshold(level)) | (high > _threshold(high))
    active &= level > 10 * math.log10(_FLOOR) + 1  # digital silence is none, whatever the threshold
    places, top = np.flatnonzero(active), _loudest(level)
    edge = max(1, round(_EDGE_SECONDS * _RATE_HZ))
    first, last = (float(_decibels(np.square(part).mean())) - top for part in (samples[:edge], samples[-edge:]))
    pitch, _ = pitch_track(samples[None].astype(np.float32), None, _RATE_HZ, _HOP)
    voiced = pitch[0, : len(active)] > 0
    return ClipMeasures(
        level_dbfs=float(_decibels(np.square(frames[active]).mean())) if len(places) else -math.inf,
        range_db=_loudest(band) - float(np.percentile(band, 5)),
        first_db=first,
        last_db=last,
        quiet_db=float(np.percentile(level, 5)) - top,
        voiced_share=float(voiced[active].mean()) if len(places) else 0.0,
        first_speech=float(places[0] * _HOP / _RATE_HZ) if len(places) else 0.0,
        end_speech=float(min(places[-1] * _HOP + _FRAME, len(samples)) / _RATE_HZ) if len(places) else 0.0,
        speech_seconds=float(len(places) * _HOP / _RATE_HZ),
    )


def check_clip(clip: AudioClip, *, max_seconds: float = MAX_SECONDS) -> list[Finding]:
    """What is wrong with a recording as a voice's prompt, errors first; `max_seconds` may be more for an embedding alone."""
    try:
        told: dict[str, str] = {warning.kind: warning.message for warning in check_audio(clip)}
    except UserError as error:
        return [_error("unusable", str(error).removeprefix(f"{clip.name}: "))]
    if clip.seconds < MIN_SECONDS:
        return [
            _error("short", f"lasts {clip.seconds:.3g} s; give a sentence of 3 to 10 s, at least {MIN_SECONDS:g} s")
        ]
    if clip.seconds > max_seconds:
        return [
            _error(
                "long", f"lasts {clip.seconds:.4g} s; at most {max_seconds:g} s fit: cut out one sentence of 3 to 10 s"
            )
        ]
    if "silence" in told:
        return [_error("silence", f"{told['silence']}; nobody speaks in it: record it again")]
    measures = measure_clip(clip.waveform, clip.rate_hz)
    findings = [
        *_speech_findings(measures),
        *_file_findings(clip, told),
        *_length_findings(clip, measures, max_seconds),
    ]
    if not any(finding.severity == "error" for finding in findings):
        findings += _sound_findings(measures)
    return sorted(findings, key=lambda finding: finding.severity != "error")


def check_transcript(text: str, seconds: float) -> list[Finding]:
    """A warning where so many letters cannot be what is said in so many seconds of speech; none for an empty text."""
    letters = [letter for letter in text if letter.isalnum()]
    if not letters or not seconds > 0:
        return []
    wide = sum(ord(letter) >= 0x2E80 for letter in letters) > len(letters) / 2  # Chinese, Japanese, Korean
    slowest, fastest = (_WIDE_SLOWEST, _WIDE_FASTEST) if wide else (_SLOWEST, _FASTEST)
    rate = len(letters) / seconds
    if slowest <= rate <= fastest:
        return []
    message = (
        f"the text has {len(letters)} letters for {seconds:.1f} s of speech, {rate:.1f} a second ({slowest:g} to {fastest:g}"
        " is usual): give exactly the words of the recording, else they leak into what is spoken"
    )
    return [_warning("transcript", message)]


def _speech_findings(m: ClipMeasures) -> list[Finding]:
    """Whether anybody speaks at all."""
    if m.speech_seconds < _LEAST_SPEECH_SECONDS:
        message = f"only {m.speech_seconds:.2f} s of it are not silent; give a sentence of 3 to 10 s"
        return [_error("silence", message)]
    if m.range_db < _STEADY_DB or (m.range_db < _NOISY_DB and m.voiced_share < _MIN_VOICED):
        message = f"is a steady sound, its level varies by {m.range_db:.0f} dB (speech: 20 or more): no speech stands out of it"
        return [_error("noise", f"{message}; record it in a quiet place")]
    return []


def _file_findings(clip: AudioClip, told: dict[str, str]) -> list[Finding]:
    """What the file is like: rate, channels, clipping, missing parts."""
    findings, peak = [], float(np.abs(clip.waveform).max())
    # A recording that was clipped and then turned down has its flat tops below full scale.
    flat = max(clip.clipped_share, float(np.mean(np.abs(clip.waveform) >= _FLAT_LEVEL * peak)))
    if flat > _RUINED_SHARE:
        findings.append(
            _error("clipping", f"{100 * flat:.0f} % of its samples are clipped; record it at a lower level")
        )
    elif flat > _FLAT_SHARE:
        message = (
            f"{100 * flat:.2f} % of its samples are clipped, and the voice will sound so; record it at a lower level"
        )
        findings.append(_warning("clipping", message))
    if "overload" in told:
        findings.append(_warning("overload", f"{told['overload']}; record or save it at a lower level"))
    if "truncated" in told:
        findings.append(_warning("truncated", f"{told['truncated']}; copy the file again"))
    if clip.rate_hz < _RATE_HZ:
        message = (
            f"sampled at {clip.rate_hz} Hz: what lies above {clip.rate_hz // 2} Hz is missing, and the voice will sound"
        )
        findings.append(_warning("rate", f"{message} dull; record it at {_RATE_HZ} Hz or more"))
    # Equal channels have as loud a mean as they are themselves.
    if clip.num_channels > 1 and peak < _SAME_PEAK * min(clip.peak, 1.0):
        message = f"its {clip.num_channels} channels differ or cancel in their mean; give the speaker's channel alone"
        findings.append(_warning("channels", message))
    return findings


def _length_findings(clip: AudioClip, m: ClipMeasures, max_seconds: float) -> list[Finding]:
    findings, lead, trail = [], m.first_speech, clip.seconds - m.end_speech
    if clip.seconds < SHORT_SECONDS:
        message = f"lasts only {clip.seconds:.1f} s; the voice is steadier with a sentence of 3 to 10 s"
        findings.append(_warning("short", message))
    elif clip.seconds > LONG_SECONDS and max_seconds <= MAX_SECONDS:
        message = f"lasts {clip.seconds:.1f} s; long prompts make words be skipped: one sentence of 3 to 10 s is better"
        findings.append(_warning("long", message))
    for where, seconds in (("starts", lead), ("ends", trail)):
        if seconds > _MAX_SILENCE_SECONDS:
            message = f"{where} with {seconds:.1f} s of silence, which the voice may imitate; leave about 0.2 s"
            findings.append(_warning("pause", message))
    return findings


def _sound_findings(m: ClipMeasures) -> list[Finding]:
    """What can be heard in speech: words cut off, noise, level, whisper."""
    findings = []
    edges = [
        name
        for name, level, least in (("start", m.first_db, -_START_DB), ("end", m.last_db, -_END_DB))
        if level
        > max(least, m.quiet_db + _ABOVE_NOISE_DB)  # near the loudest frames, and no noise that is always there
    ]
    if edges:
        message = f"sounds right at its {' and its '.join(edges)}, so that a word may be cut off; cut it in a pause"
        findings.append(_warning("cut", f"{message}, with 0.1 s of silence left"))
    if m.range_db < _NOISY_DB:
        message = (
            f"its speech is only {m.range_db:.0f} dB louder than the noise in its pauses; record it in a quiet place"
        )
        findings.append(_warning("noise", message))
    if m.voiced_share < _MIN_VOICED:
        message = (
            f"{100 * m.voiced_share:.0f} % of it has a pitch: whispered, or noise? (that cannot be told); listen to it"
        )
        findings.append(_warning("unvoiced", message))
    if m.level_dbfs < _QUIET_DBFS:
        findings.append(
            _warning("level", f"is quiet ({m.level_dbfs:.0f} dBFS), and the voice will be; raise it to about -20")
        )
    elif m.level_dbfs > _LOUD_DBFS:
        message = f"is very loud ({m.level_dbfs:.0f} dBFS), as compressed sound is; use a recording with about -20"
        findings.append(_warning("level", message))
    return findings


def _threshold(level: Float[np.ndarray, " F"]) -> float:
    """dB under which a frame is silent; where pauses are noisy a little above them, but never near the loudest frames."""
    top, quiet = _loudest(level), float(np.percentile(level, 5))
    return max(top - _SILENCE_DB, min(quiet + 6.0, top - _SILENCE_DB + 10.0))


def _loudest(level: Float[np.ndarray, " F"]) -> float:
    """dB of the loudest twentieth of the frames, of a long clip of the loudest quarter of a second: a word among pauses."""
    return float(np.sort(level)[-max(1, min(len(level) // 20, _LOUD_FRAMES))])


def _decibels(power: Any) -> Any:
    return 10 * np.log10(power + _FLOOR)


def _error(kind: str, message: str) -> Finding:
    return Finding(severity="error", kind=kind, message=message)


def _warning(kind: str, message: str) -> Finding:
    return Finding(severity="warning", kind=kind, message=message)
