"""Speaker embeddings among batches: of each record or its speaker's mean, whoever loads them; what has none is no row."""

import pathlib
import pickle

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cv2jax.config import DataConfig, MeshConfig, TrainConfig, UserError
from cv2jax.data.batch import Batch, batch_hash
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.embeddings import save_embeddings
from cv2jax.data.loader import make_loader
from cv2jax.data.shards import Corpus
from cv2jax.data.speaker_vectors import SpeakerVectors
from cv2jax.data.tokens import TokenWriter
from cv2jax.parallel.mesh import make_mesh
from tests.data.speech_files import make_record

NUM_TRAIN, NUM_TEST, SIZE = 21, 6, 5
EVERYTHING = list(range(NUM_TRAIN + NUM_TEST))
LENGTHS = np.random.default_rng(7).integers(2880, 8640, len(EVERYTHING)).tolist()
VECTORS = np.random.default_rng(8).normal(size=(len(EVERYTHING), SIZE)).astype(np.float32)


def write_vectors(path: pathlib.Path, numbers: list[int] = EVERYTHING, prefix: str = "") -> pathlib.Path:
    """Of the utterances u<number>, speaker s<number % 3>, last first."""
    ids = [f"{prefix}u{number}" for number in numbers[::-1]]
    speakers = [f"{prefix}s{number % 3}" for number in numbers[::-1]]
    save_embeddings(path, ids, speakers, VECTORS[numbers[::-1]], {"encoder": "e" * 64})
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("vectors") / "corpus"
    records = [make_record(number, length, None) for number, length in enumerate(LENGTHS)]
    write_corpus(path, {"train": records[:NUM_TRAIN], "test": records[NUM_TRAIN:]}, rate_hz=24000, shard_utterances=8)
    with TokenWriter(path.parent / "tokens.npz", {"tokenizer": "abc", "num_codes": 9}) as writer:
        for record in records:
            writer.write(record.id, "a.wav", np.arange(3, dtype=np.int32), num_frames=6, seconds=0.1)
    return path


@pytest.fixture(scope="module")
def vectors(corpus: pathlib.Path) -> pathlib.Path:
    return write_vectors(corpus.parent / "e.npz")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_batches(corpus: pathlib.Path, vectors: pathlib.Path | str, **data: object) -> CorpusBatches:
    fields = {"corpus": str(corpus), "speech_tokens": str(corpus.parent / "tokens.npz"), "batch_seconds": 1.5}
    given = {"speaker_embeddings": str(vectors), "batch_multiple": 4, "num_buckets": 2}
    config = TrainConfig(
        name="small", task="flow_matching", model=None, num_steps=7, seed=5, data=DataConfig(**(fields | given | data))
    )
    return CorpusBatches(config, require_text=False, speech_tokens=True, embeddings=True)


def load(batches: CorpusBatches, mesh: Mesh) -> list[Batch]:
    return [batch for _, _, batch in batches.training(0, 7, mesh)] + [batch for _, batch in batches.judged(mesh)]


@pytest.mark.parametrize("of", ["utterance", "speaker"])
def test_each_row_has_the_embedding_of_its_record(
    corpus: pathlib.Path, vectors: pathlib.Path, mesh: Mesh, of: str
) -> None:
    means = np.stack([VECTORS[first::3].astype(np.float64).mean(axis=0) for first in range(3)]).astype(np.float32)
    wanted = {"utterance": VECTORS, "speaker": means[np.array(EVERYTHING) % 3]}[of]
    batches = make_batches(corpus, vectors, embedding_of=of)
    seen = set()
    for _, num_rows, batch in batches.training(0, batches.plan.num_batches, mesh):
        assert (batch["speaker_embedding"].shape, batch["speaker_embedding"].dtype) == ((num_rows, SIZE), np.float32)
        np.testing.assert_array_equal(batch["speaker_embedding"], wanted[batch["utterance"]])
        assert batch["row_mask"].all()
        seen |= set(batch["utterance"].tolist())
    assert seen == set(range(NUM_TRAIN))
    for _, batch in batches.judged(mesh):
        rows = NUM_TRAIN + batch["utterance"][batch["row_mask"]]
        np.testing.assert_array_equal(batch["speaker_embedding"][batch["row_mask"]], wanted[rows])


def test_batches_have_the_shapes_they_promise(corpus: pathlib.Path, vectors: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus, vectors)
    shapes = batches.training_shapes() + batches.held_out_shapes()
    promised = {tuple(sorted((name, spec.shape, str(spec.dtype)) for name, spec in s.items())) for s in shapes}
    found = {tuple(sorted((n, a.shape, str(a.dtype)) for n, a in batch.items())) for batch in load(batches, mesh)}
    assert found == promised
    assert all(s["speaker_embedding"].shape == (s["waveform"].shape[0], SIZE) for s in shapes)


@pytest.mark.parametrize("data", [{"num_threads": 3}, pytest.param({"num_workers": 2}, marks=pytest.mark.full)])
def test_threads_and_worker_processes_load_the_same(corpus, vectors, mesh: Mesh, data: dict[str, int]) -> None:
    one, other = make_batches(corpus, vectors, num_threads=1), make_batches(corpus, vectors, **data)
    assert [batch_hash(batch) for batch in load(one, mesh)] == [batch_hash(batch) for batch in load(other, mesh)]


def test_what_a_worker_is_sent_finds_the_same(corpus: pathlib.Path, vectors: pathlib.Path) -> None:
    file = SpeakerVectors(vectors, "speaker")
    sent, split = pickle.loads(pickle.dumps(file)), Corpus(corpus).split("test")
    for record in map(split.read, range(NUM_TEST)):
        np.testing.assert_array_equal(sent.find(record), file.find(record))


def test_hosts_together_load_the_same(corpus: pathlib.Path, vectors: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus, vectors)

    def hosts(count: int) -> list[list[Batch]]:
        rows = [lambda size, i=i: np.arange(size).reshape(count, -1)[i] for i in range(count)]
        loaders = [
            make_loader(batches.train, batches.plan, None, num_steps=4, rows=r, embeddings=batches.embeddings)
            for r in rows
        ]
        return [[batch for _, batch in loader] for loader in loaders]

    [alone], parts = hosts(1), hosts(2)
    for whole, *halves in zip(alone, *parts, strict=True):
        assert batch_hash({name: np.concatenate([half[name] for half in halves]) for name in whole}) == batch_hash(
            whole
        )


def test_without_the_option_batches_are_as_ever(corpus: pathlib.Path, vectors: pathlib.Path, mesh: Mesh) -> None:
    plain, rich = (load(make_batches(corpus, path), mesh) for path in ("", vectors))
    assert make_batches(corpus, "").embeddings is None
    for one, other in zip(plain, rich, strict=True):
        assert other.keys() - one.keys() == {"speaker_embedding"}
        assert batch_hash(one) == batch_hash({name: other[name] for name in one})


@pytest.mark.parametrize("of", ["utterance", "speaker"])
def test_rows_without_an_embedding_are_masked_and_a_few_are_named(
    corpus: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    lacking = {n for n in EVERYTHING if (n % 3 == 1 if of == "speaker" else n < 8)}
    vectors = write_vectors(tmp_path / "e.npz", [n for n in EVERYTHING if n not in lacking])
    batches = make_batches(corpus, vectors, embedding_of=of)
    caplog.clear()
    for _, _, batch in batches.training(0, batches.plan.num_batches, mesh):
        assert batch["row_mask"].tolist() == [n not in lacking for n in batch["utterance"].tolist()]
        assert not batch["speaker_embedding"][~batch["row_mask"]].any()
        assert batch["num_speech_tokens"].all()  # these they have
    named = [message for message in caplog.messages if "is left out" in message]
    assert len(set(named)) == len(named) == {"utterance": 5, "speaker": 1}[of]
    assert all("e.npz has no embedding of it" in message for message in named)
    assert named[0].startswith({"utterance": "utterance 'u", "speaker": "speaker 's1'"}[of])


def test_a_file_of_another_corpus_is_refused_at_once(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = write_vectors(tmp_path / "other.npz", prefix="x/")
    for of, first in (("utterance", "utterance 'u0'"), ("speaker", "speaker 's0'")):
        with pytest.raises(
            UserError, match=rf"other\.npz: has no embedding of {first} and .* of split train of .*embed"
        ):
            make_batches(corpus, other, embedding_of=of)
    only_train = write_vectors(tmp_path / "train.npz", EVERYTHING[:NUM_TRAIN])
    with pytest.raises(UserError, match=rf"no embedding of utterance 'u{NUM_TRAIN}' and those of 5 .* of split test"):
        make_batches(corpus, only_train)
    make_batches(corpus, only_train, embedding_of="speaker")  # whose means it knows
    with pytest.raises(UserError, match=r"gone\.npz: cannot read .No such file or directory.; give the file of `cv2"):
        make_batches(corpus, tmp_path / "gone.npz")


def test_the_hash_is_of_what_is_used(vectors: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = SpeakerVectors(vectors, "utterance")
    assert (first.encoder, first.dim, first.of) == ("e" * 64, SIZE, "utterance")
    assert first.hash == SpeakerVectors(write_vectors(tmp_path / "same.npz"), "utterance").hash
    few = SpeakerVectors(write_vectors(tmp_path / "few.npz", EVERYTHING[1:]), "utterance")
    assert len({first.hash, SpeakerVectors(vectors, "speaker").hash, few.hash}) == 3


def test_names_are_found_among_any_others(tmp_path: pathlib.Path) -> None:
    names = ["u10", "ü/3", "u1", "u", "\N{GRINNING FACE}", "Z" * 70]
    save_embeddings(tmp_path / "e.npz", names, ["a"] * 6, VECTORS[:6], {"encoder": "e"})
    file = pickle.loads(pickle.dumps(SpeakerVectors(tmp_path / "e.npz", "utterance")))
    for name, vector in zip(names, VECTORS, strict=False):
        record = make_record(0, 9)
        np.testing.assert_array_equal(file.find(_named(record, name)), vector)
    for name in ("", "u11", "Z" * 71, "~", "\N{GRINNING FACE}\N{GRINNING FACE}"):
        assert file.find(_named(make_record(0, 9), name)) is None


def _named(record, name):
    return type(record)(**{**vars(record), "id": name})


def test_a_worker_takes_no_vectors_along_and_sees_that_a_file_has_changed(tmp_path: pathlib.Path) -> None:
    count, size = 2_000, 192
    ids, large = [f"u{i}" for i in range(count)], np.zeros((count, size), np.float32)
    save_embeddings(tmp_path / "e.npz", ids, ["a"] * count, large, {"encoder": "e"})
    pickled = pickle.dumps(SpeakerVectors(tmp_path / "e.npz", "utterance"))
    assert len(pickled) < 10 * count  # 768 bytes a vector stay where they are
    save_embeddings(tmp_path / "e.npz", ids, ["a"] * count, large + 1, {"encoder": "e"})
    with pytest.raises(UserError, match=r"e\.npz: has changed since it was opened; start again"):
        pickle.loads(pickled)
    (tmp_path / "e.npz").unlink()
    with pytest.raises(UserError, match=r"e\.npz: cannot read .No such file or directory.; give the file of"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": VECTORS.astype(np.float64)}, "the vectors are float64"),
        ({"embeddings": np.asfortranarray(VECTORS)}, "vectors lie in columns"),
        (None, "ids is compressed"),
    ],
)
def test_a_file_that_cannot_be_mapped_is_one_line(vectors, tmp_path, change, message) -> None:
    with np.load(vectors) as arrays:
        (np.savez_compressed if change is None else np.savez)(tmp_path / "e.npz", **(dict(arrays) | (change or {})))
    with pytest.raises(UserError, match=rf"is not as `cv2jax embed` writes it \({message}\); run that again"):
        SpeakerVectors(tmp_path / "e.npz", "utterance")
