"""The token files: both formats, whole or not there, a full disk; read in order and by id."""

import concurrent.futures
import hashlib
import json
import pathlib
import pickle

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.tokens import SpeechTokenFile, TokenWriter, read_speech_tokens

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


def many(path: pathlib.Path, count: int = 300) -> dict[str, list[int]]:
    random = np.random.default_rng(2)
    expected = {}
    with TokenWriter(path, {"tokenizer": "abc"}) as writer:
        for number in random.permutation(count):
            tokens = random.integers(0, 6561, number % 7).astype(np.int32)
            writer.write(f"dir/ä {number}", "a.wav", tokens, num_frames=4, seconds=0.1)
            expected[f"dir/ä {number}"] = tokens.tolist()
    return expected


@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
def test_tokens_are_read_in_order_and_by_id(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    expected = many(path)
    read = list(read_speech_tokens(path))
    assert {identity: tokens.tolist() for identity, tokens in read} == expected
    assert [identity for identity, _ in read] == list(expected)
    assert all(tokens.dtype == np.int32 for _, tokens in read)
    file = SpeechTokenFile(path)
    assert (len(file), file.tokenizer) == (300, "abc")
    assert [identity for identity, _ in file] == list(expected)
    for identity in sorted(expected):
        assert identity in file
        assert file.read(identity).tolist() == expected[identity]
        assert file.read(identity).dtype == np.int32
    for missing in ("dir/ä 300", "", "metadata", "\ud800"):
        assert missing not in file
        with pytest.raises(KeyError, match="holds no tokens"):
            file.read(missing)


def test_ids_with_one_hash_are_told_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2jax.data.tokens._hash", lambda identity: len(identity) % 2)
    expected = many(tmp_path / "t.jsonl", 30)
    file = SpeechTokenFile(tmp_path / "t.jsonl")
    assert {identity: file.read(identity).tolist() for identity in expected} == expected
    assert "dir/ä 30" not in file


LINE = '{"id": "a", "speech_tokens": [1, 2], "tokenizer": "abc"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no utterance"),
        (LINE + LINE[:20], r"t\.jsonl: no whole token file \(line 2: JSONDecodeError"),
        (LINE + "[1]\n", "line 2: TypeError"),
        (LINE + '{"id": "b", "tokenizer": "abc"}\n', "line 2: KeyError: 'speech_tokens'"),
        (LINE.replace('"a"', "7"), "line 1: ValueError: id and tokenizer must be strings"),
        (LINE.replace("2]", "2.5]"), "line 1: ValueError: speech tokens must be a list of integers"),
        (LINE.replace("2]", "[2]]"), "line 1: ValueError"),
        (LINE.replace("2]", "99999999999]"), "line 1: ValueError: a speech token does not fit 32 bits"),
        (LINE.replace("2]", "-2]"), "line 1: ValueError: a speech token is negative"),
        (LINE + LINE.replace("abc", "abd").replace('"a"', '"b"'), "line 2: made by tokenizer abd, those before by abc"),
        (LINE + LINE.replace('"a"', '"b"') + LINE, 'id "a" occurs twice'),
    ],
)
def test_damaged_lines_are_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        SpeechTokenFile(tmp_path / "t.jsonl")
    assert "\n" not in str(error.value)
    if "line" in message and "made by" not in message:
        with pytest.raises(UserError, match=message):
            list(read_speech_tokens(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
def test_a_pickled_file_reads_the_same_in_many_threads(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    expected = many(path)
    file = pickle.loads(pickle.dumps(SpeechTokenFile(path)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(file.read, list(expected) * 3))
    assert [tokens.tolist() for tokens in found] == list(expected.values()) * 3
    assert (len(file), file.tokenizer) == (300, "abc")
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        pickle.loads(pickle.dumps(file)).read("dir/ä 1")


@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
def test_the_hash_is_that_of_the_content(tmp_path: pathlib.Path, suffix: str) -> None:
    def hash_of(name: str, identity: str, tokens: list[int]) -> str:
        path = tmp_path / f"{name}.{suffix}"
        with TokenWriter(path, {"tokenizer": "abc"}) as writer:
            writer.write(identity, "a.wav", np.array(tokens, np.int32), num_frames=8, seconds=0.1)
        assert suffix == "npz" or SpeechTokenFile(path).hash == hashlib.sha256(path.read_bytes()).hexdigest()
        return SpeechTokenFile(path).hash

    assert hash_of("x", "a", [3, 4]) == hash_of("y", "a", [3, 4])
    assert len({hash_of("x", *change) for change in (("a", [3, 4]), ("a", [4, 3]), ("b", [3, 4]), ("a", [3]))}) == 4


def test_tokens_lie_below_the_number_of_codes(tmp_path: pathlib.Path) -> None:
    for suffix, stated, found in (("jsonl", 27, 10), ("npz", 27, 27), ("npz", 0, 0)):
        path = tmp_path / f"{suffix}{stated}.{suffix}"
        with TokenWriter(path, {"tokenizer": "abc"} | ({"num_codes": stated} if stated else {})) as writer:
            for identity, tokens in (("a", [3, 9]), ("b", []), ("c", [0])):
                writer.write(identity, "a.wav", np.array(tokens, np.int32), num_frames=8, seconds=0.1)
        assert SpeechTokenFile(path).num_codes == found
    with TokenWriter(tmp_path / "t.npz", {"tokenizer": "abc", "num_codes": 9}) as writer:
        writer.write("a", "a.wav", np.array([3, 9], np.int32), num_frames=8, seconds=0.1)
    with pytest.raises(UserError, match=r't\.npz: no whole token file \("a" has token 9, of 9 codes'):
        SpeechTokenFile(tmp_path / "t.npz").read("a")


def test_damaged_archives_and_missing_files_are_one_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.npz"
    many(path)
    data = path.read_bytes()
    for read in (SpeechTokenFile, lambda path: list(read_speech_tokens(path))):
        path.write_bytes(data[:-30])
        with pytest.raises(UserError, match="no whole token file"):
            read(path)
        with pytest.raises(UserError, match=r"gone\.jsonl: cannot read \(No such file"):
            read(tmp_path / "gone.jsonl")
        with pytest.raises(UserError, match=r"\.jsonl or \.npz"):
            read(tmp_path / "t.txt")
    np.savez(path, a=TOKENS)
    with pytest.raises(UserError, match="no whole token file"):
        SpeechTokenFile(path)
    at = data.index(b"NUMPY") + 200
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    with pytest.raises(UserError, match="no whole token file"):
        list(read_speech_tokens(path))
