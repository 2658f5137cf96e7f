"""The token corpus: what goes in comes out, in small and wide vocabularies; whole or not there; damage is one line."""

import dataclasses
import errno
import json
import os
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.token_corpus import TokenCorpus, TokenCorpusMetadata, TokenCorpusWriter, TokenRecord

METADATA = TokenCorpusMetadata(
    speech_tokenizer="aa", num_codes=6561, text_tokenizer="bb", vocabulary_size=151_936, prefix="none"
)


def record(number: int, metadata: TokenCorpusMetadata = METADATA, **fields: Any) -> TokenRecord:
    random = np.random.default_rng(number)
    defaults: dict[str, Any] = {
        "id": f"dir/ä {number}",
        "text": "" if number % 5 == 3 else "你好, wörld 🙂" * int(random.integers(1, 4)),
        "text_tokens": random.integers(0, metadata.vocabulary_size, random.integers(0, 9)),
        "speech_tokens": random.integers(0, metadata.num_codes, random.integers(0, 40)).astype(np.int32),
        "speaker": f"speaker {number % 3}",
        "language": "",
    }
    return TokenRecord(**(defaults | fields))


def write(
    path: pathlib.Path, splits: dict[str, int], metadata: TokenCorpusMetadata = METADATA, text: str = "{}"
) -> TokenCorpus:
    with TokenCorpusWriter(path, metadata) as writer:
        (writer.text_tokenizer / "tokenizer.json").write_text(text)
        for number in range(max(splits.values())):  # the splits take turns
            for place, (split, count) in enumerate(splits.items()):
                if number < count:
                    writer.write(split, record(100 * place + number, metadata))
    return TokenCorpus(path)


def check_equal(left: TokenRecord, right: TokenRecord) -> None:
    for field in dataclasses.fields(TokenRecord):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(other, str):
            assert one == other
        else:
            assert one.dtype == np.int32
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("num_codes", "vocabulary_size"), [(6561, 300), (1 << 16, 151_936), ((1 << 16) + 1, 1 << 16)])
def test_what_goes_in_comes_out(tmp_path: pathlib.Path, num_codes: int, vocabulary_size: int) -> None:
    metadata = dataclasses.replace(METADATA, num_codes=num_codes, vocabulary_size=vocabulary_size)
    corpus = write(tmp_path / "new" / "c", {"train": 23, "dev": 7}, metadata)
    assert corpus.metadata == metadata
    assert corpus.splits == ("train", "dev")
    assert (corpus.text_tokenizer / "tokenizer.json").read_text() == "{}"
    corpus.verify()
    for place, (name, count) in enumerate({"train": 23, "dev": 7}.items()):
        split = corpus.split(name)
        expected = [record(100 * place + number, metadata) for number in range(count)]
        assert (split.name, len(split)) == (name, count)
        for column, lengths in (("text_tokens", split.num_text), ("speech_tokens", split.num_speech)):
            assert lengths.dtype == np.int32
            assert lengths.tolist() == [len(getattr(one, column)) for one in expected]
        for row in np.random.default_rng(0).permutation(count):
            check_equal(split.read(int(row)), expected[row])
        with pytest.raises(IndexError, match=f"row {count}"):
            split.read(count)
        with pytest.raises(IndexError):
            split.read(-1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c"]
    width = 2 if num_codes <= 1 << 16 else 4
    size = (tmp_path / "new/c/splits/train/speech_tokens.values").stat().st_size
    assert size == width * corpus.split("train").num_speech.sum()


def test_the_largest_tokens_survive(tmp_path: pathlib.Path) -> None:
    metadata = dataclasses.replace(METADATA, num_codes=1 << 16)
    with TokenCorpusWriter(tmp_path / "c", metadata) as writer:
        writer.write("a", record(0, text_tokens=np.array([151_935]), speech_tokens=np.array([65_535, 0])))
    found = TokenCorpus(tmp_path / "c").split("a").read(0)
    assert (found.text_tokens.tolist(), found.speech_tokens.tolist()) == ([151_935], [65_535, 0])


def test_a_split_pickles_small_and_opens_again(tmp_path: pathlib.Path) -> None:
    split = write(tmp_path / "c", {"train": 300}).split("train")
    data = pickle.dumps(split)
    assert len(data) < 1000
    check_equal(pickle.loads(data).read(299), record(299))


def test_the_hash_tells_contents_apart(tmp_path: pathlib.Path) -> None:
    one = write(tmp_path / "1", {"train": 3})
    assert write(tmp_path / "2", {"train": 3}).hash == one.hash
    others = [
        write(tmp_path / "3", {"train": 4}),
        write(tmp_path / "4", {"test": 3}),
        write(tmp_path / "5", {"train": 3}, dataclasses.replace(METADATA, speech_tokenizer="ab")),
        write(tmp_path / "6", {"train": 3}, text="[]"),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_tokens": np.array([5, 151_936])},
            r'"b\$": text token 151936 at 1 lies outside the vocabulary of 151936',
        ),
        ({"speech_tokens": np.array([0, 0, 6561, -1])}, "speech token 6561 at 2 lies outside the vocabulary of 6561"),
        ({"speech_tokens": np.array([-1])}, "speech token -1 at 0"),
        ({"text": "\ud800"}, "not UTF-8"),
    ],
)
def test_bad_utterances_are_named_and_leave_no_trace(
    tmp_path: pathlib.Path, fields: dict[str, Any], message: str
) -> None:
    with TokenCorpusWriter(tmp_path / "c", METADATA) as writer:
        writer.write("a", record(0))
        with pytest.raises(UserError, match=message):
            writer.write("a", record(1, **({"id": "b$"} | fields)))
        writer.write("a", record(2))
    split = TokenCorpus(tmp_path / "c").split("a")
    assert len(split) == 2
    check_equal(split.read(1), record(2))


def test_an_error_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with TokenCorpusWriter(tmp_path / "c", METADATA) as writer:
            writer.write("a", record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UserError, match="no utterance"), TokenCorpusWriter(tmp_path / "c", METADATA):
        pass
    with (
        pytest.raises(UserError, match=r'split "\.\./x" must be'),
        TokenCorpusWriter(tmp_path / "c", METADATA) as writer,
    ):
        writer.write("../x", record(0))

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(UserError, match=r"c: cannot write \(No space left on device\)"):
        write(tmp_path / "c", {"a": 2})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: pathlib.Path) -> None:
    corpus = write(tmp_path / "c", {"a": 2})
    (tmp_path / "file").write_text("x")
    for path in ("c", "file", "file/c"):
        with pytest.raises(UserError, match=r"exists and is not empty|cannot write"):
            TokenCorpusWriter(tmp_path / path, METADATA)
    assert TokenCorpus(tmp_path / "c").hash == corpus.hash
    (tmp_path / "empty").mkdir()
    assert len(write(tmp_path / "empty", {"a": 2}).split("a")) == 2
    late = TokenCorpusWriter(tmp_path / "late", METADATA)
    late.write("a", record(0))
    write(tmp_path / "early", {"a": 1})
    (tmp_path / "early").rename(tmp_path / "late")  # as if another process had been faster
    with pytest.raises(UserError, match="not empty"):
        late.close()
    TokenCorpus(tmp_path / "late").verify()


@pytest.mark.parametrize("file", ["speech_tokens.values", "id.values", "text_tokens.lengths", "text.ends"])
def test_missing_cut_and_changed_files_are_named(tmp_path: pathlib.Path, file: str) -> None:
    write(tmp_path / "c", {"train": 9})
    path = tmp_path / "c/splits/train" / file
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{file} is truncated or changed: {len(data) - 1} of {len(data)} bytes"):
        TokenCorpus(tmp_path / "c")
    path.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        TokenCorpus(tmp_path / "c")
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        TokenCorpus(tmp_path / "c").verify()


def test_texts_that_are_no_utf8_and_ends_that_lie_are_user_errors(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "c", {"train": 9})
    folder = tmp_path / "c/splits/train"
    text = (folder / "text.values").read_bytes()
    (folder / "text.values").write_bytes(b"\xff" * len(text))
    with pytest.raises(UserError, match="train: row 0 is damaged"):
        TokenCorpus(tmp_path / "c").split("train").read(0)
    size = (folder / "text.ends").stat().st_size
    (folder / "text.ends").write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"text\.values: not as long"):
        TokenCorpus(tmp_path / "c").split("train")


def test_a_damaged_index_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not a token corpus"):
        TokenCorpus(tmp_path)
    corpus = write(tmp_path / "c", {"train": 9, "dev": 1})
    with pytest.raises(UserError, match="no split 'test'; it has train, dev"):
        corpus.split("test")
    path = tmp_path / "c" / "index.json"
    index = json.loads(path.read_text())
    for changed, message in [
        ("{", "damaged"),
        ("[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        ({}, "damaged"),
        (index | {"version": 2}, "format version 2, this is 1"),
        (index | {"splits": {}}, "its hash differs"),
        (index | {"hash": "0"}, "its hash differs"),
    ]:
        data = json.dumps(changed) if isinstance(changed, dict) else changed
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(UserError, match=message) as error:
            TokenCorpus(tmp_path / "c")
        assert "\n" not in str(error.value)
