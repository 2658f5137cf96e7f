"""WORLD's F0 at the mel's frames: on the right time, right for made-up voices, zeros where there is none."""

import sys

import numpy as np
import pytest

from cv2jax.audio import f0
from cv2jax.audio.f0 import METHODS, fundamental_frequency
from cv2jax.audio.mel import MEL_HOP, MEL_RATE_HZ, mel_spectrogram
from cv2jax.config import UserError


def voice(hz: np.ndarray) -> np.ndarray:
    """Eight harmonics of a fundamental that is given a sample."""
    phase = 2 * np.pi * np.cumsum(hz) / MEL_RATE_HZ
    return 0.1 * sum(np.sin(k * phase) / k for k in range(1, 9))


def centres(num_samples: int) -> np.ndarray:
    """Seconds of the middle of each mel frame."""
    return (np.arange(num_samples // MEL_HOP) + 0.5) * MEL_HOP / MEL_RATE_HZ


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_samples", [36000, 36479])
def test_a_glide_is_read_at_the_centres_of_the_frames(method: str, num_samples: int) -> None:
    rising = lambda seconds: 120 + 200 * seconds  # noqa: E731
    found = fundamental_frequency(
        voice(rising(np.arange(num_samples) / MEL_RATE_HZ)), MEL_RATE_HZ, MEL_HOP, method=method
    )
    assert found.shape == (75,)
    assert found.dtype == np.float32
    error = (found - rising(centres(num_samples)))[5:-5]
    # A frame that lay 10 ms off would be 2 Hz off.
    assert abs(error.mean()) < 0.1
    assert abs(error).max() < 0.5


def test_frames_are_those_of_the_mel() -> None:
    # A click in the middle of frame 30 is loudest there, and what begins there is voiced from there on.
    waveform = np.zeros((1, 36000))
    waveform[0, 30 * MEL_HOP + MEL_HOP // 2] = 1.0
    mel, num_frames = mel_spectrogram(waveform)
    energy = mel[0].mean(axis=0)
    assert energy.argmax() == 30
    assert abs(energy[29] - energy[31]) < 0.05
    sound = voice(np.full(36000, 200.0)) * (np.arange(36000) >= 30 * MEL_HOP)
    found = fundamental_frequency(sound, MEL_RATE_HZ, MEL_HOP)
    assert len(found) == num_frames[0]
    assert abs(int(np.flatnonzero(found)[0]) - 30) <= 1
    assert np.median(found[found > 0]) == pytest.approx(200, abs=0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "waveform",
    [
        np.zeros(24000),
        np.full(24000, 0.5),
        0.1 * np.random.default_rng(0).standard_normal(24000),
        np.sign(np.random.default_rng(1).standard_normal(24000)),  # noise at full scale
        voice(np.full(1200, 150.0)),  # 50 ms
        np.ones(480),
        np.ones(7),
        np.zeros(0),
    ],
    ids=["silence", "constant", "noise", "clipped", "50ms", "frame", "less", "nothing"],
)
def test_what_has_no_pitch_is_zeros(waveform: np.ndarray, method: str) -> None:
    found = fundamental_frequency(waveform, MEL_RATE_HZ, MEL_HOP, method=method)
    assert found.shape == (len(waveform) // MEL_HOP,)
    assert not found.any()


@pytest.mark.parametrize("waveform", [voice(np.full(4800, 210.0)), np.clip(99 * voice(np.full(24000, 210.0)), -1, 1)])
def test_short_and_clipped_voices_are_heard(waveform: np.ndarray) -> None:
    found = fundamental_frequency(waveform, MEL_RATE_HZ, MEL_HOP)
    assert np.count_nonzero(found) >= 5
    assert np.median(found[found > 0]) == pytest.approx(210, abs=1)


def test_the_same_twice() -> None:
    waveform = voice(150 + 20 * np.sin(np.arange(24000) / 3000)) + 0.01 * np.random.default_rng(1).standard_normal(
        24000
    )
    one, other = (fundamental_frequency(waveform, MEL_RATE_HZ, MEL_HOP) for _ in range(2))
    assert one.any()
    np.testing.assert_array_equal(one, other)


def test_without_pyworld_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    f0._load_world.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package pyworld: pip install 'cv2jax\[vocoder\]'"):
        fundamental_frequency(np.ones(480), MEL_RATE_HZ, MEL_HOP)
    assert "pyworld" not in sys.modules  # nor does anything else import the package, which wants an old setuptools
