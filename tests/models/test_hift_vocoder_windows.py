"""Windows of a batch: the mel is the whole utterance's, wave and F0 are of the same frames, draws are of the key."""

import jax
import numpy as np
import pytest

from cv2jax.audio.mel import MEL_HOP, mel_spectrogram
from cv2jax.models.hift_vocoder.windows import cut_windows

FRAMES = 6
cut = jax.jit(cut_windows, static_argnums=(4, 5))


def batch(num_frames: tuple[int, ...] = (30, 17, 8), extra: int = 100):
    """(waveform, num_samples, f0): F0 is the number of the frame, behind the end of a row is garbage."""
    rng = np.random.default_rng(0)
    num_samples = np.array([MEL_HOP * n + extra for n in num_frames], np.int32)
    waveform = rng.integers(-9000, 9000, (len(num_frames), int(num_samples.max()) + 50)).astype(np.int16)
    f0 = np.tile(np.arange(1, waveform.shape[1] // MEL_HOP + 1, dtype=np.float32), (len(num_frames), 1))
    for row, count in enumerate(num_frames):
        f0[row, count:] = 0
    return waveform, num_samples, f0


def starts_of(windows) -> np.ndarray:
    return np.asarray(windows["f0"][:, 0]).astype(int) - 1


def test_windows_are_of_the_whole_utterance():
    waveform, num_samples, f0 = batch()
    windows = cut(waveform, num_samples, f0, jax.random.key(0), FRAMES, 4)
    assert {name: a.shape for name, a in windows.items()} == {
        "waveform": (12, FRAMES * MEL_HOP),
        "mel": (12, FRAMES, 80),
        "f0": (12, FRAMES),
    }
    scaled = waveform.astype(np.float32) / 32768
    mel, counts = mel_spectrogram(scaled, num_samples)
    starts = starts_of(windows)
    for i, start in enumerate(starts):
        row = i // 4  # windows of an utterance lie together
        assert 0 <= start <= counts[row] - FRAMES
        np.testing.assert_array_equal(windows["f0"][i], start + 1 + np.arange(FRAMES))
        here = slice(MEL_HOP * start, MEL_HOP * (start + FRAMES))
        np.testing.assert_array_equal(windows["waveform"][i], scaled[row, here])
        np.testing.assert_allclose(windows["mel"][i], mel[row, :, start : start + FRAMES].T, rtol=0, atol=1e-4)


def test_every_start_is_drawn_about_as_often():
    waveform, num_samples, f0 = batch((10,))
    found = starts_of(cut(waveform, num_samples, f0, jax.random.key(1), FRAMES, 400))
    counts = np.bincount(found, minlength=5)
    assert len(counts) == 5  # the first and the last frame are seen
    assert counts.min() > 50


@pytest.mark.parametrize("num_frames", [6, 3, 1])
def test_a_short_utterance_is_followed_by_silence(num_frames):
    waveform, num_samples, f0 = batch((num_frames, 12), extra=0)
    windows = cut(waveform, num_samples, f0, jax.random.key(2), FRAMES, 2)
    scaled = waveform.astype(np.float32) / 32768
    for i in range(2):
        end = num_frames * MEL_HOP
        np.testing.assert_array_equal(windows["waveform"][i, :end], scaled[0, :end])
        np.testing.assert_array_equal(windows["f0"][i], [*range(1, num_frames + 1), *[0] * (FRAMES - num_frames)])
    alone, _ = mel_spectrogram(scaled[:1, : int(num_samples[0])])
    np.testing.assert_allclose(windows["mel"][0, :num_frames], alone[0].T, rtol=0, atol=1e-4)
    assert np.isfinite(windows["mel"]).all()
    # What follows is the reflection that the last frames see, then nothing.
    behind = windows["waveform"][0, end + 720 :]
    assert not np.any(behind)


def test_draws_are_of_the_key_alone():
    waveform, num_samples, f0 = batch()
    one, two, other = (cut(waveform, num_samples, f0, jax.random.key(k), FRAMES, 4) for k in (3, 3, 4))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    assert (starts_of(one) != starts_of(other)).any()
    assert len(set(starts_of(one)[:4])) > 1  # of one utterance
    garbage = waveform.copy()
    for row, count in enumerate(num_samples):
        garbage[row, count:] = -20000
    third = cut(garbage, num_samples, f0, jax.random.key(3), FRAMES, 4)
    for name in one:
        np.testing.assert_array_equal(one[name], third[name])
