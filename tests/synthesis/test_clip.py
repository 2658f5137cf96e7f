"""What is found about recordings: each fault by its name, no fault where there is none, and what cannot be told said so."""

import dataclasses

import numpy as np
import pytest

from cv2jax.audio.io import AudioClip
from cv2jax.synthesis.clip import check_clip, check_transcript, measure_clip
from tests.small_model_directory import make_speech

RATE = 16000


def clip_of(waveform, rate_hz=RATE, **fields):
    waveform = np.asarray(waveform, np.float32)
    peak = float(np.abs(waveform).max(initial=0.0))
    clipped = float(np.mean(np.abs(waveform) >= 0.9999)) if waveform.size else 0.0
    facts = {"name": "a.wav", "num_channels": 1, "peak": peak, "clipped_share": clipped}
    return AudioClip(waveform=waveform, rate_hz=rate_hz, **facts | fields)


def found(clip, **options):
    return [(finding.severity, finding.kind) for finding in check_clip(clip, **options)]


def noise(seconds=4.0, colour=0.0, seed=0):
    """Steady noise whose power falls with frequency to the power of `colour`: 0 white, 1 pink, 2 brown."""
    count = int(seconds * RATE)
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=count))
    wave = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20) ** (colour / 2), n=count)
    return 0.3 * wave / np.abs(wave).max()


@pytest.mark.parametrize("rate_hz", [16000, 22050, 48000])
@pytest.mark.parametrize("seconds", [2.1, 7.3])
def test_speech_is_fit_at_any_rate(rate_hz, seconds):
    clip = clip_of(make_speech(seconds, rate_hz, seed=rate_hz), rate_hz)
    assert check_clip(clip) == []
    measures = measure_clip(clip.waveform, rate_hz)
    assert abs(measures.first_speech - 0.2) < 0.05
    assert -26 < measures.level_dbfs < -23
    assert measures.range_db > 30
    assert measures.voiced_share > 0.4
    assert max(measures.first_db, measures.last_db) < -60


@pytest.mark.parametrize(
    ("waveform", "kind", "message"),
    [
        (make_speech(0.2, lead=0, trail=0), "short", "lasts 0.2 s; give a sentence of 3 to 10 s, at least 0.3 s"),
        (make_speech(60), "long", "lasts 60 s; at most 30 s fit: cut out one sentence"),
        (make_speech(30.01), "long", "lasts 30.01 s; at most 30 s fit"),
        (np.zeros(3 * RATE), "silence", "nobody speaks in it: record it again"),
        (1e-3 * make_speech(3), "silence", "nobody speaks in it: record it again"),
        (noise(), "noise", "is a steady sound"),
        (noise(colour=1, seed=1), "noise", "no speech stands out of it; record it in a quiet place"),
        (noise(2.5, colour=2, seed=2), "noise", "no speech stands out of it"),
        (0.03 * noise(), "noise", "no speech stands out of it"),
        (0.3 * np.sin(np.arange(3 * RATE) * 0.08), "noise", "is a steady sound, its level varies by 0 dB"),
        (
            np.clip(40 * make_speech(3), -0.95, 0.95),
            "clipping",
            "% of its samples are clipped; record it at a lower level",
        ),
        ([0.1, np.nan] * RATE, "unusable", "holds NaN or infinite samples; write the file again"),
        ([], "unusable", "holds no samples"),
        (np.eye(1, 3 * RATE, RATE)[0], "silence", "only 0.04 s of it are not silent; give a sentence of 3 to 10 s"),
    ],
)
def test_what_no_voice_can_come_of_is_refused(waveform, kind, message):
    errors = [finding for finding in check_clip(clip_of(waveform)) if finding.severity == "error"]
    assert errors[0].kind == kind
    assert message in errors[0].message
    assert "a.wav" not in errors[0].message  # who reports it says where


def test_too_slow_a_rate_is_refused_and_a_slow_one_warned_of():
    assert found(clip_of(make_speech(3, 4000), 4000)) == [("error", "unusable")]
    [finding] = check_clip(clip_of(make_speech(3, 8000), 8000))
    assert (finding.severity, finding.kind) == ("warning", "rate")
    assert finding.message.startswith("sampled at 8000 Hz: what lies above 4000 Hz is missing")


def test_thirty_seconds_are_the_most_for_a_prompt_but_not_for_an_embedding():
    waveform = make_speech(30)
    assert found(clip_of(waveform)) == [("warning", "long")]
    assert found(clip_of(make_speech(40)), max_seconds=300.0) == []


def test_words_that_are_cut_off_are_told_by_the_edges():
    whole = make_speech(4)
    middle = round(1.33 * RATE)  # inside a syllable
    [cut] = [finding for finding in check_clip(clip_of(whole[:middle])) if finding.kind == "cut"]
    assert cut.message.startswith("sounds right at its end, so that a word may be cut off")
    assert found(clip_of(whole[middle:])) == [("warning", "cut")]
    both = check_clip(clip_of(whole[middle : middle + round(1.5 * RATE)]))
    assert any("at its start and its end" in finding.message for finding in both)
    # With noise all the time an edge is no louder for a word.
    noisy = whole + 0.02 * noise(4)
    assert "cut" not in [kind for _, kind in found(clip_of(noisy))]


def test_noise_level_clipping_and_silence_are_warned_of():
    speech = make_speech(4)
    [finding] = check_clip(clip_of(speech + 0.5 * noise(4)))
    assert (finding.severity, finding.kind) == ("warning", "noise")
    assert "dB louder than the noise in its pauses" in finding.message
    [finding] = check_clip(clip_of(0.1 * speech))
    assert finding.message == "is quiet (-45 dBFS), and the voice will be; raise it to about -20"
    assert found(clip_of(np.sign(speech) * np.abs(speech / 0.3) ** 0.4)) == [("warning", "level")]  # much compressed
    ceiling = np.quantile(np.abs(speech), 0.99)
    clipped = np.clip(speech, -ceiling, ceiling)  # and turned down: nowhere near full scale
    assert found(clip_of(clipped)) == [("warning", "clipping")]
    at_full_scale = clip_of(np.clip(speech / ceiling, -1, 1))
    assert at_full_scale.clipped_share > 1e-3
    assert ("warning", "clipping") in found(at_full_scale)
    late = check_clip(clip_of(make_speech(5, lead=1.5, trail=1.2)))
    assert [finding.message[:28] for finding in late] == [
        "starts with 1.5 s of silence",
        "ends with 1.2 s of silence, ",
    ]


def test_sound_in_bursts_without_a_pitch_is_not_taken_for_speech_nor_refused():
    bursts = noise() * (np.sin(2 * np.pi * 3 * np.arange(4 * RATE) / RATE) > 0)
    [finding] = [f for f in check_clip(clip_of(bursts)) if f.kind == "unvoiced"]
    assert finding.severity == "warning"
    assert "whispered, or noise? (that cannot be told)" in finding.message


def test_channels_that_cancel_are_told_and_equal_ones_are_not():
    speech = make_speech(3)
    peak = float(np.abs(speech).max())
    assert found(clip_of(speech, num_channels=2)) == []
    assert found(clip_of(0.3 * speech, num_channels=2, peak=peak)) == [("warning", "channels")]


def test_what_the_file_lacks_is_passed_on():
    kinds = found(clip_of(make_speech(3), missing_share=0.2))
    assert kinds == [("warning", "truncated")]
    assert ("warning", "overload") in found(clip_of(make_speech(3), peak=1.5))


def test_errors_come_first():
    clip = dataclasses.replace(clip_of(0.3 * np.sin(np.arange(RATE) * 0.08)), missing_share=0.2)
    findings = found(clip)
    assert findings[0] == ("error", "noise")
    assert ("warning", "truncated") in findings


@pytest.mark.parametrize(
    ("text", "seconds", "fits"),
    [
        ("", 3.0, True),
        ("— … !", 3.0, True),  # no letters
        ("The quick brown fox jumps over the lazy dog.", 2.5, True),
        ("The quick brown fox jumps over the lazy dog.", 0.9, False),
        ("Yes.", 6.0, False),
        ("希望你以后能够做的比我还好呦", 3.5, True),
        ("希望你以后能够做的比我还好呦", 1.0, False),
        ("はい", 5.0, False),
    ],
)
def test_a_text_that_cannot_be_of_the_recording_is_warned_of(text, seconds, fits):
    findings = check_transcript(text, seconds)
    assert [finding.kind for finding in findings] == ([] if fits else ["transcript"])
    assert all("give exactly the words of the recording" in finding.message for finding in findings)
