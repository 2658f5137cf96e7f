"""The token files: both formats, whole or not there, a full disk."""

import json
import pathlib

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.tokens import TokenWriter

TOKENS = np.arange(5, dtype=np.int32)


def write(path: pathlib.Path) -> None:
    with TokenWriter(path, {"tokenizer": "abc"}) as writer:
        for identity in ("dir/ä 1", "b"):
            writer.write(identity, "a.wav", TOKENS, num_frames=20, seconds=0.2)


def test_jsonl_and_npz_hold_the_same(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "t.jsonl")
    write(tmp_path / "t.npz")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    with np.load(tmp_path / "t.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["metadata"])) == {"tokenizer": "abc"}
        assert [line["id"] for line in lines] == list(arrays)[:-1] == ["dir/ä 1", "b"]
        for line in lines:
            assert line["tokenizer"] == "abc"
            assert line["speech_tokens"] == arrays[line["id"]].tolist() == TOKENS.tolist()
            assert arrays[line["id"]].dtype == np.int32
    first = (tmp_path / "t.npz").read_bytes()
    write(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == first


@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
def test_an_error_leaves_what_was_there(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    path.write_text("older")

    def interrupted() -> None:
        with TokenWriter(path, {"tokenizer": "abc"}) as writer:
            writer.write("a", "a.wav", TOKENS, num_frames=20, seconds=0.2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"\.jsonl or \.npz"):
        TokenWriter(tmp_path / "t.txt", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        TokenWriter(tmp_path / "file" / "t.jsonl", {})

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path / "t.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
