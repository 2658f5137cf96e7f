"""Reading and writing: every format and source, every bad input, every warning."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cv2jax.audio.io import (
    AudioClip,
    check_audio,
    convert_rate,
    load_waveform,
    read_audio,
    to_int16,
    write_wav,
)
from cv2jax.config import UserError


def tone(seconds: float = 0.5, rate_hz: int = 24000, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def encode(samples: np.ndarray, rate_hz: int = 24000, container: str = "WAV", **options: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate_hz, format=container, **options)
    return stream.getvalue()


def make_clip(samples: np.ndarray) -> AudioClip:
    return read_audio(encode(samples, subtype="FLOAT"))


def test_a_file_of_any_name(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff.wav")
    try:
        path.write_bytes(encode(tone()))
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    assert len(read_audio(path).waveform) == len(tone())


@pytest.mark.parametrize(
    ("container", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("AIFF", 1e-4), ("OGG", 0.05), ("MP3", 0.1)]
)
def test_formats_from_path_bytes_and_stream(tmp_path, container, tolerance):
    samples = tone()
    path = tmp_path / f"tone.{container.lower()}"
    path.write_bytes(encode(samples, container=container))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        clip = read_audio(source)
        assert clip.waveform.dtype == np.float32
        assert (clip.rate_hz, clip.num_channels, clip.clipped_share) == (24000, 1, 0.0)
        assert clip.seconds == pytest.approx(0.5)
        np.testing.assert_allclose(clip.waveform, samples, atol=tolerance)
        assert check_audio(clip) == ()


@pytest.mark.parametrize("num_channels", [2, 3, 8])
def test_channels_are_averaged(num_channels):
    samples = tone()[:, None] * np.linspace(0.1, 1.0, num_channels, dtype=np.float32)
    clip = read_audio(encode(samples, subtype="FLOAT"))
    assert clip.num_channels == num_channels
    np.testing.assert_allclose(clip.waveform, samples.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100, 48000])
def test_load_resamples(tmp_path, rate_hz):
    write_wav(tmp_path / "tone.wav", tone(rate_hz=rate_hz), rate_hz)
    waveform = load_waveform(tmp_path / "tone.wav", 24000)
    assert waveform.dtype == np.float32
    assert waveform.shape == (12000,)
    np.testing.assert_allclose(waveform[200:-200], tone()[200:-200], atol=2e-3)


def test_resampling_never_leaves_full_scale():
    square = np.sign(np.sin(np.arange(8000) * 0.3) + 0.01).astype(np.float32)
    waveform = convert_rate(read_audio(encode(square, rate_hz=16000)), 24000)
    assert np.abs(waveform).max() == pytest.approx(1.0)


def test_write_then_read_is_exact_to_16_bits(tmp_path):
    samples = np.array([-1.5, -1.0, -0.25, 0.0, 1 / 32768, 0.999, 1.0, 2.0], np.float32)
    write_wav(tmp_path / "a.wav", samples, 24000)
    clip = read_audio(tmp_path / "a.wav")
    assert to_int16(samples).tolist() == [-32768, -32768, -8192, 0, 1, 32735, 32767, 32767]
    np.testing.assert_array_equal(to_int16(clip.waveform), to_int16(samples))
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"


def test_writing_refuses_nan_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match="NaN"):
        write_wav(tmp_path / "a.wav", np.array([np.nan], np.float32), 24000)
    assert not (tmp_path / "a.wav").exists()
    with pytest.raises(UserError, match="cannot write"):
        write_wav(tmp_path / "none" / "a.wav", np.zeros(4, np.float32), 24000)


def test_streamed_files_that_state_no_length():
    flac = bytearray(encode(tone(), container="FLAC"))
    flac[21] &= 0xF0  # the 36-bit sample count of STREAMINFO: 0 is "unknown"
    flac[22:26] = bytes(4)
    np.testing.assert_allclose(read_audio(bytes(flac)).waveform, tone(), atol=1e-4)
    wav = bytearray(encode(tone()))
    at = wav.index(b"data") + 4
    wav[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(wav)).waveform) == 12000


@pytest.mark.parametrize("name", ["a.wav", "folder", "a.tar::b.wav"])
def test_missing_files(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{name.split('::')[0]}: (no such|not a file)") as caught:
        load_waveform(tmp_path / name, 24000)
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(), 24000)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who may run this, can read everything
    with pytest.raises(UserError, match="permission"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("content", [b"", b"RIFF", bytes(1000), b"not audio at all " * 50])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".raw"])
def test_corrupt_files(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.\w+: cannot decode") as caught:
        read_audio(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "AIFF"])
def test_cut_files_are_refused(container):
    content = encode(np.random.default_rng(0).uniform(-0.5, 0.5, 24000).astype(np.float32), container=container)
    with pytest.raises(UserError, match=r"cut short|cannot decode"):
        read_audio(content[: len(content) // 2])


def test_cut_mp3_is_a_warning():
    content = encode(tone(4.0), container="MP3")
    warnings = check_audio(read_audio(content[: len(content) // 2]))
    assert [warning.kind for warning in warnings] == ["truncated"]


@pytest.mark.parametrize(
    ("samples", "rate_hz", "message"),
    [
        (np.zeros(0, np.float32), 24000, "no samples"),
        (np.array([0.1, np.nan, 0.2] * 900, np.float32), 24000, "NaN or infinite"),
        (np.array([0.1, np.inf, 0.2] * 900, np.float32), 24000, "NaN or infinite"),
        (np.array([[0.1, -np.inf]] * 900, np.float32), 24000, "NaN or infinite"),
        (tone(rate_hz=7999), 7999, "7999 Hz; at least 8000 Hz"),
        (tone(), 768_001, "states 768001 Hz; at most 768000 Hz is real"),
        (tone(), 2_147_483_647, "at most 768000 Hz is real"),
    ],
)
def test_unusable_audio(tmp_path, samples, rate_hz, message):
    path = tmp_path / "bad.wav"
    path.write_bytes(encode(samples, rate_hz, subtype="FLOAT"))
    with pytest.raises(UserError, match=rf"bad\.wav: .*{message}"):
        load_waveform(path, 24000)


@pytest.mark.parametrize(
    ("samples", "kinds"),
    [
        (np.clip(tone(level=3.0), -1, 1), ["clipping"]),
        (tone(level=3.0), ["overload"]),
        (np.zeros(24000, np.float32), ["silence"]),
        (tone(level=1e-3), ["silence"]),
        (tone(0.05), ["short"]),
        (np.zeros(10, np.float32), ["silence", "short"]),
        (tone(level=0.99), []),
        (tone(level=0.01), []),
    ],
)
def test_warnings(samples, kinds):
    clip = make_clip(samples)
    warnings = check_audio(clip)
    assert [warning.kind for warning in warnings] == kinds
    assert all(warning.message for warning in warnings)
    assert np.abs(clip.waveform).max() <= 1.0


def test_reading_from_threads(tmp_path):
    paths = [tmp_path / f"{index}.wav" for index in range(8)]
    for index, path in enumerate(paths):
        write_wav(path, np.full(400, index / 10, np.float32), 16000)
    found: dict[Path, float] = {}

    def work(path: Path) -> None:
        found[path] = float(read_audio(path).waveform[0])

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[path] for path in paths] == pytest.approx([index / 10 for index in range(8)], abs=1e-4)
