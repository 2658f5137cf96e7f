import json
import pickle
import threading

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.shards import Corpus, Record, decode_record, encode_record
from tests.data.speech_files import make_record


def assert_same(left: Record, right: Record) -> None:
    for name in ("id", "text", "speaker", "language", "instruct", "rate_hz"):
        assert getattr(left, name) == getattr(right, name)
    np.testing.assert_array_equal(left.waveform, right.waveform)


@pytest.fixture
def corpus(tmp_path):
    splits = {
        "train": [make_record(i, 300 + i) for i in range(11)],
        "test": [make_record(i, text=None) for i in (20, 21)],
    }
    write_corpus(tmp_path / "corpus", splits, rate_hz=24000, shard_utterances=4)
    return tmp_path / "corpus"


@pytest.mark.parametrize("encoding", ["flac", "pcm16"])
def test_record_round_trip_is_exact(encoding):
    loud = np.array([-32768, 32767, 0, -1, 1] * 50, np.int16)
    record = Record(
        id="é/1", text="你好, \n", speaker="s", language="zh", instruct="slowly", rate_hz=16000, waveform=loud
    )
    assert_same(decode_record(encode_record(record, encoding)), record)


def test_cut_records_and_unknown_encodings_are_refused():
    data = encode_record(make_record(1), "pcm16")
    with pytest.raises(ValueError, match="holds 498 of 500"):
        decode_record(data[:-4])
    with pytest.raises(ValueError, match="shorter"):
        decode_record(data[:3])
    with pytest.raises(UserError, match="flac"):
        encode_record(make_record(1), "mp3")


def test_corpus_reads_back_every_record_and_column(corpus):
    opened = Corpus(corpus)
    assert opened.splits == ("train", "test")
    assert opened.rate_hz == 24000
    train = opened.split("train")
    assert len(train) == 11
    for row in (10, 0, 4, 3):
        assert_same(train.read(row), make_record(row, 300 + row))
    np.testing.assert_array_equal(train.num_samples, 300 + np.arange(11))
    np.testing.assert_array_equal(train.num_characters, np.full(11, len("hi you")))
    assert [opened.speakers[i] for i in train.speaker] == [f"s{i % 3}" for i in range(11)]
    assert opened.languages == ["en"]
    assert train.characters == {" ": 11, "h": 11, "i": 11, "o": 11, "u": 11, "y": 11}
    assert train.seconds == pytest.approx(sum(300 + i for i in range(11)) / 24000, abs=1e-3)
    assert opened.split("test").num_characters.tolist() == [0, 0]
    assert isinstance(train.num_samples, np.memmap)
    assert sum(shard["num_records"] for shard in opened.index["shards"]) == 13
    opened.verify()


def test_split_pickles_and_reads_from_threads(corpus):
    train = pickle.loads(pickle.dumps(Corpus(corpus).split("train")))
    wrong = []

    def read(start):
        for step in range(40):
            row = (start * 3 + step) % 11
            if train.read(row).id != f"u{row}":
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(IndexError):
        train.read(11)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("cv2jax.data.shards._MAX_OPEN_SHARDS", 2)
    write_corpus(tmp_path, {"train": (make_record(i) for i in range(7))}, rate_hz=24000, shard_utterances=1)
    train = Corpus(tmp_path).split("train")
    assert [record.id for record in train] + [train.read(0).id] == [f"u{i}" for i in (*range(7), 0)]
    assert len(train._readers._readers) == 2


def test_mistakes_are_named(corpus, tmp_path):
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        Corpus(corpus).split("dev")
    with pytest.raises(UserError, match="holds no record"):
        write_corpus(tmp_path / "empty", {"train": []}, rate_hz=24000)


@pytest.mark.parametrize("keep", [0, 1000, 70_000])
def test_truncated_shard_is_named_on_opening_and_reading(tmp_path, keep):
    write_corpus(tmp_path, {"train": [make_record(i, 30_000) for i in range(4)]}, rate_hz=24000, encoding="pcm16")
    train, path = Corpus(tmp_path).split("train"), tmp_path / "shards/train-00000.arrayrecord"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=rf"train-00000.arrayrecord is truncated or changed: {keep} of .*cv2jax prepare"
    ):
        Corpus(tmp_path)
    with pytest.raises(UserError, match=r"train-00000.arrayrecord: record 2 cannot be read .*cv2jax prepare"):
        train.read(2)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        Corpus(tmp_path)


def test_changed_bytes_are_found(corpus):
    path = corpus / "shards/train-00000.arrayrecord"
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)
    opened = Corpus(corpus)
    with pytest.raises(UserError, match="sha256"):
        opened.verify()
    with pytest.raises(UserError, match="record 0 cannot be read"):
        opened.split("train").read(0)


def test_damaged_index_is_named(corpus):
    column = corpus / "index/train.num_samples.npy"
    column.write_bytes(column.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"train.num_samples.npy"):
        Corpus(corpus).split("train")
    (corpus / "index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Corpus(corpus)


def test_hash_follows_the_contents_and_rewriting_changes_nothing(tmp_path):
    def write(name, seed):
        records = [make_record(i) for i in range(5)] + [make_record(seed)]
        write_corpus(tmp_path / name, {"train": records}, rate_hz=24000, shard_utterances=2)
        return Corpus(tmp_path / name).hash

    assert write("a", 7) == write("b", 7) != write("c", 8)


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 1}', "shards", "splits", "\udcff"])
def test_an_index_without_its_keys_is_named(corpus, text):
    path = corpus / "index.json"
    values = json.loads(path.read_text())
    if text in values:  # a key to leave out of what lies below it
        del (values[text][0] if text == "shards" else values[text]["test"])[
            "num_records" if text == "shards" else "seconds"
        ]
        text = json.dumps(values)
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"index\.json: .*cv2jax prepare|format version"):
        Corpus(corpus)
