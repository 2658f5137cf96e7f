"""Files of speaker embeddings: means of raw vectors, lookup, whole or not there, damage in one line."""

import json

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data import embeddings
from cv2jax.data.embeddings import EmbeddingFile, check_embeddings_path, save_embeddings

IDS, SPEAKERS = ["u2", "u1", "ü/3"], ["bo", "ann", "bo"]
VECTORS = np.array([[1, 2], [3, 4], [5, -6]], np.float32)


@pytest.fixture
def path(tmp_path):
    counts = save_embeddings(tmp_path / "a" / "e.npz", IDS, SPEAKERS, VECTORS, {"encoder": "abc", "step": 7})
    assert counts == {"ann": 1, "bo": 2}
    return tmp_path / "a" / "e.npz"


def test_utterances_and_speakers_are_found_by_name(path):
    file = EmbeddingFile(path)
    assert (file.encoder, file.dim, len(file)) == ("abc", 2, 3)
    assert (file.ids, file.speakers) == (IDS, ["ann", "bo"])
    for identity, vector in zip(IDS, VECTORS, strict=True):
        assert identity in file
        np.testing.assert_array_equal(file.utterance(identity), vector)
    np.testing.assert_array_equal(file.speaker("bo"), [3, -2])  # of the raw vectors
    np.testing.assert_array_equal(file.speaker("ann"), [3, 4])
    for lookup, name in ((file.utterance, "u9"), (file.speaker, "u1")):
        with pytest.raises(KeyError, match=name):
            lookup(name)
    assert "u9" not in file


def test_the_file_says_of_how_many_each_mean_is(path):
    with np.load(path) as arrays:
        assert arrays["num_utterances"].tolist() == [1, 2]
        assert arrays["utterance_speaker"].tolist() == [1, 0, 1]
        assert json.loads(str(arrays["metadata"])) == {"version": 1, "encoder": "abc", "step": 7}
        assert arrays["embeddings"].dtype == arrays["speaker_embeddings"].dtype == np.float32


def test_a_file_that_cannot_be_finished_leaves_the_one_before(path, monkeypatch):
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings.np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .No space left on device.; make room"):
        save_embeddings(path, IDS, SPEAKERS, VECTORS, {"encoder": "other"})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["e.npz"]


def test_damage_is_one_line(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"no whole file of embeddings .*; run `cv2jax embed` again"):
        EmbeddingFile(path)
    np.savez(path, ids=np.array(IDS), speakers=np.array(["bo"]), embeddings=VECTORS)
    with pytest.raises(UserError, match="speaker_embeddings"):
        EmbeddingFile(path)
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"embeddings": VECTORS * np.float32(np.nan)})
    with pytest.raises(UserError, match="not all of them finite"):
        EmbeddingFile(path)
    with pytest.raises(UserError, match="3 of 3 embeddings are not finite, that of 'u2' first"):
        save_embeddings(path, IDS, SPEAKERS, VECTORS * np.float32(np.nan), {"encoder": "abc"})
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .No such file"):
        EmbeddingFile(path)


def test_only_npz_and_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"embeddings are written as .npz"):
        check_embeddings_path(tmp_path / "e.jsonl")
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        check_embeddings_path(tmp_path / "d.npz")
