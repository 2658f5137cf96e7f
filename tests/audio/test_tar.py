"""Random access into tar archives."""

import io
import multiprocessing
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from cv2jax.audio import tar as module
from cv2jax.audio.io import load_waveform, read_audio
from cv2jax.audio.tar import list_tar_members, read_tar_member, split_tar_source
from cv2jax.config import UserError


def make_tar(path, contents: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in contents.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def clip_bytes(level: float, container: str = "MP3") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.full(24000, level, np.float32), 24000, format=container)
    return stream.getvalue()


def test_members_are_read_as_audio(tmp_path):
    path = tmp_path / "EN-B000.tar"
    make_tar(path, {"EN/one.mp3": clip_bytes(0.1), "EN/one.json": b"{}", "two.flac": clip_bytes(0.2, "FLAC")})
    assert list_tar_members(path) == ["EN/one.mp3", "EN/one.json", "two.flac"]
    assert read_tar_member(path, "EN/one.json") == b"{}"
    clip = read_audio(f"{path}::two.flac")
    assert clip.name == f"{path}::two.flac"
    np.testing.assert_allclose(clip.waveform, 0.2, atol=1e-4)
    assert load_waveform(f"{path}::EN/one.mp3", 16000).shape == (16000,)


def test_only_tar_sources_are_split():
    assert split_tar_source("a/b.tar::c/d.mp3") == ("a/b.tar", "c/d.mp3")
    assert split_tar_source("a/b.tar::c::d.mp3") == ("a/b.tar", "c::d.mp3")
    assert split_tar_source("a/b::c.wav") is None
    assert split_tar_source("a/b.tar") is None


def test_each_archive_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    make_tar(path, {f"{index}": bytes([index]) * 700 for index in range(20)})
    scans = []
    opened = tarfile.open
    monkeypatch.setattr(module.tarfile, "open", lambda *args, **kwargs: scans.append(1) or opened(*args, **kwargs))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: read_tar_member(path, str(index % 20)), range(200)))
    assert found == [bytes([index % 20]) * 700 for index in range(200)]
    assert len(scans) == 1
    monkeypatch.undo()
    make_tar(path, {"new": b"changed"})
    os.utime(path, ns=(1, 1))
    assert read_tar_member(path, "new") == b"changed"


def test_many_archives_keep_few_descriptors(tmp_path):
    paths = [tmp_path / f"{index}.tar" for index in range(40)]
    for path in paths:
        make_tar(path, {"x": path.name.encode()})
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(lambda path: read_tar_member(path, "x"), paths)) == [p.name.encode() for p in paths]
    assert len(os.listdir("/proc/self/fd")) <= before + 16


def _read_in_child(path: str) -> bytes:
    return read_tar_member(path, "x")


def test_other_processes_read_too(tmp_path):
    path = tmp_path / "a.tar"
    make_tar(path, {"x": b"content"})
    assert read_tar_member(path, "x") == b"content"
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(_read_in_child, (str(path),)) == b"content"


@pytest.mark.parametrize("damage", ["missing", "member", "compressed", "garbage", "cut", "folder"])
def test_bad_archives(tmp_path, damage):
    path, member = tmp_path / "a.tar", "x.wav"
    if damage == "folder":
        path.mkdir()
    elif damage == "garbage":
        path.write_bytes(b"no tar" * 500)
    elif damage != "missing":
        make_tar(path, {"x.wav": clip_bytes(0.1, "WAV")}, "w:gz" if damage == "compressed" else "w")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if damage == "member":
        member = "y.wav"
    with pytest.raises(UserError, match=r"a\.tar") as caught:
        read_audio(f"{path}::{member}")
    assert "\n" not in str(caught.value)
