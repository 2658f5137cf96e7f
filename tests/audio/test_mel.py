"""Log-mel spectrograms: goldens, librosa in float64, padding, short rows, gradients, jit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from cv2jax.audio.mel import MEL_MARGIN, log_mel_whisper, mel_spectrogram, mel_with_margins

GOLDENS = Path(__file__).parents[1] / "goldens" / "features.npz"
BOTH = pytest.mark.parametrize(("function", "hop"), [(log_mel_whisper, 160), (mel_spectrogram, 480)])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def librosa_whisper(waveform: np.ndarray) -> np.ndarray:
    power = np.abs(librosa.stft(waveform.astype(np.float64), n_fft=400, hop_length=160, pad_mode="reflect")) ** 2
    mel = librosa.filters.mel(sr=16000, n_fft=400, n_mels=128, dtype=np.float64) @ power[:, : len(waveform) // 160]
    log_mel = np.log10(np.maximum(mel, 1e-10))
    return (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4


def librosa_mel(waveform: np.ndarray, fmax: float | None) -> np.ndarray:
    padded = np.pad(waveform.astype(np.float64), 720, mode="reflect")
    spectrum = librosa.stft(padded, n_fft=1920, hop_length=480, center=False)
    filters = librosa.filters.mel(sr=24000, n_fft=1920, n_mels=80, fmax=fmax, dtype=np.float64)
    return np.log(np.maximum(filters @ np.sqrt(np.abs(spectrum) ** 2 + 1e-9), 1e-5))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dft", ["auto", "matmul"])
def test_goldens(golden, convert, dft):
    audio16, audio24 = convert(golden["y16"]), convert(golden["y24"])
    whisper, _ = log_mel_whisper(audio16, dft=dft)
    assert isinstance(whisper, np.ndarray) == (convert is np.asarray)
    np.testing.assert_allclose(whisper, golden["whisper128"], atol=1e-4, rtol=0)
    for fmax, name in ((8000.0, "mel80_fmax8000"), (None, "mel80_fmaxNone")):
        np.testing.assert_allclose(mel_spectrogram(audio24, fmax=fmax, dft=dft)[0], golden[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seconds", [0.1, 0.137, 0.5, 2.3])
def test_librosa_in_float64(seconds):
    rows = noise(2, int(seconds * 16000)), noise(2, int(seconds * 24000))
    whisper, num_frames = log_mel_whisper(rows[0])
    assert num_frames.tolist() == [rows[0].shape[1] // 160] * 2
    np.testing.assert_allclose(whisper[1], librosa_whisper(rows[0][1]), atol=1e-4, rtol=0)
    for fmax in (8000.0, None):
        mel, _ = mel_spectrogram(rows[1], fmax=fmax)
        np.testing.assert_allclose(mel[1], librosa_mel(rows[1][1], fmax), atol=1e-4, rtol=0)


def test_float64_stays_float64():
    waveform = noise(1, 8000).astype(np.float64)
    mel, _ = log_mel_whisper(waveform)
    assert mel.dtype == np.float64
    np.testing.assert_allclose(mel[0], librosa_whisper(waveform[0]), atol=1e-6)


@BOTH
@pytest.mark.parametrize("run", [lambda function: function, jax.jit])
def test_garbage_in_the_padding_changes_nothing(function, hop, run):
    counts = np.array([1600, 4801, 9600, 7, 250, 0], np.int32)
    clean = noise(6, 9600)
    clean[1] *= 1e-3  # a quiet row must keep its own floor
    garbage = clean.copy()
    for row, count in enumerate(counts):
        clean[row, count:] = 0.0
        garbage[row, count:] = 1e4
        garbage[row, -1:] = np.where(count < 9600, np.nan, garbage[row, -1:])
    expected, num_frames = run(function)(clean, counts)
    found, _ = run(function)(garbage, counts)
    np.testing.assert_array_equal(found, expected)
    assert num_frames.tolist() == [count // hop for count in counts]
    for row, count in enumerate(counts):
        frames = count // hop
        np.testing.assert_array_equal(expected[row, :, frames:], 0.0)
        alone, _ = function(clean[row : row + 1, :count])
        assert alone.shape[2] == frames
        np.testing.assert_allclose(expected[row, :, :frames], alone[0], atol=2e-5)


@BOTH
def test_jit_equals_numpy(function, hop):
    waveform, counts = noise(3, 6000, seed=1), np.array([6000, 3333, 0], np.int32)
    traced, traced_frames = jax.jit(function)(waveform, counts)
    mel, num_frames = function(waveform, counts)
    assert traced.shape == (3, mel.shape[1], 6000 // hop)
    np.testing.assert_allclose(traced, mel, atol=2e-5)
    np.testing.assert_array_equal(traced_frames, num_frames)


@BOTH
@pytest.mark.parametrize("dft", ["fft", "matmul"])
def test_gradients_are_finite_at_silence(function, hop, dft):
    waveform = jnp.zeros((3, 2400)).at[1].set(noise(2400, seed=2))
    counts = jnp.array([2400, 1500, 0])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(x, counts, dft=dft)[0] ** 2)))(waveform)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient[1, :1440]).max()) > 0
    np.testing.assert_array_equal(gradient[1, 1500:], 0.0)


@BOTH
@pytest.mark.parametrize("width", [0, 1, 100, 479])
def test_rows_too_short_for_a_frame(function, hop, width):
    mel, num_frames = function(noise(2, width))
    assert mel.shape[2] == width // hop
    assert num_frames.tolist() == [width // hop] * 2
    assert np.isfinite(mel).all()


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("fmax", [8000.0, None])
def test_a_cut_with_margins_has_the_frames_of_the_whole(convert, fmax):
    assert MEL_MARGIN == 720
    audio = noise(2, 480 * 12, seed=3)
    want, _ = mel_spectrogram(audio, fmax=fmax)
    for start, frames in ((2, 7), (5, 1)):  # two frames are what the margin reaches into
        cut = audio[:, 480 * start - 720 : 480 * (start + frames) + 720]
        got = mel_with_margins(convert(cut), fmax=fmax)
        assert isinstance(got, np.ndarray) == (convert is np.asarray)
        assert got.shape == (2, 80, frames)
        np.testing.assert_allclose(got, want[:, :, start : start + frames], atol=1e-4, rtol=0)


def test_reflected_margins_are_the_whole_utterance():
    audio = noise(1, 480 * 4, seed=4)
    padded = np.pad(audio, ((0, 0), (720, 720)), mode="reflect")
    np.testing.assert_array_equal(mel_with_margins(padded), mel_spectrogram(audio)[0])
    assert mel_with_margins(np.zeros((1, 1440), np.float32)).shape == (1, 80, 0)
