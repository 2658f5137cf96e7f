"""Batches with F0: each row has its own, whoever loads them; other batches stay as they were."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cv2jax.config import DataConfig, MeshConfig, TrainConfig, UserError
from cv2jax.data.batch import Batch, batch_hash
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.f0 import F0File
from cv2jax.jobs.f0 import compute_f0
from cv2jax.parallel.mesh import make_mesh
from tests.data.speech_files import make_record

RATE_HZ, HOP = 24000, 480
NUM_TRAIN, NUM_TEST = 21, 9
LENGTHS = np.random.default_rng(7).integers(3000, 9000, NUM_TRAIN + NUM_TEST).tolist()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("f0") / "corpus"
    records = [make_record(number, length, None) for number, length in enumerate(LENGTHS)]
    splits = {"train": records[:NUM_TRAIN], "test": records[NUM_TRAIN:]}
    write_corpus(path, splits, rate_hz=RATE_HZ, shard_utterances=8)
    compute_f0(path, method="dio", workers=1)
    return path


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_batches(corpus: pathlib.Path, *, f0: bool = True, **data: object) -> CorpusBatches:
    fields = {"corpus": str(corpus), "batch_seconds": 1.5, "batch_multiple": 4, "num_buckets": 3}
    config = TrainConfig(
        name="small",
        task="hift_vocoder",
        model=None,
        num_steps=7,
        seed=5,
        data=DataConfig(**(fields | data)),
        evaluate_utterances=6,
    )
    return CorpusBatches(config, require_text=False, f0=f0)


def load(batches: CorpusBatches, mesh: Mesh, encode: object = None) -> list[Batch]:
    judged = [batch for _, batch in batches.judged(mesh, encode)]
    return [batch for _, _, batch in batches.training(0, 7, mesh, encode)] + judged


def test_each_row_has_the_f0_of_its_record(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches, file = make_batches(corpus), F0File(corpus, "train")
    voiced = 0
    for _, num_rows, batch in batches.training(0, 7, mesh):
        assert batch["f0"].shape == (num_rows, -(-batch["waveform"].shape[1] // HOP))
        assert batch["f0"].dtype == np.float32
        for b, row in enumerate(batch["utterance"].tolist()):
            expected, count = file.read(row), LENGTHS[row] // HOP
            assert len(expected) == count
            np.testing.assert_array_equal(batch["f0"][b, :count], expected)
            assert not batch["f0"][b, count:].any()
            voiced += np.count_nonzero(expected)
    assert voiced > 0
    held_out, seen = F0File(corpus, "test"), {}
    for _, batch in batches.judged(mesh):
        for b in np.flatnonzero(batch["row_mask"]).tolist():
            seen[int(batch["utterance"][b])] = batch["f0"][b]
    rows = [number * NUM_TEST // 6 for number in range(6)]
    assert sorted(seen) == list(range(6))
    for number, row in enumerate(rows):
        expected = held_out.read(row)
        np.testing.assert_array_equal(seen[number][: len(expected)], expected)
        assert not seen[number][len(expected) :].any()


def test_batches_have_the_shapes_they_promise(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus)
    promised = {
        tuple(sorted((name, spec.shape, str(spec.dtype)) for name, spec in shapes.items()))
        for shapes in batches.training_shapes() + batches.held_out_shapes()
    }
    found = {
        tuple(sorted((name, array.shape, str(array.dtype)) for name, array in batch.items()))
        for batch in load(batches, mesh)
    }
    assert found == promised
    assert {name for shapes in promised for name, _, _ in shapes} == {
        *("waveform", "num_samples", "utterance", "row_mask", "f0")
    }


def test_worker_processes_load_the_same(corpus: pathlib.Path, mesh: Mesh) -> None:
    one, other = (make_batches(corpus, num_workers=workers) for workers in (0, 1))
    assert [batch_hash(b) for b in load(one, mesh)] == [batch_hash(b) for b in load(other, mesh)]


def test_without_f0_batches_are_as_ever(corpus: pathlib.Path, mesh: Mesh) -> None:
    # The hash of batches of texts, as they were before F0 could be among them; texts are null, so all is audio.
    encode = lambda text: np.zeros(0, np.int32)  # noqa: E731
    plain, rich = load(make_batches(corpus, f0=False), mesh, encode), load(make_batches(corpus), mesh)
    assert {"text_tokens", "num_text_tokens"} == plain[0].keys() - rich[0].keys()
    for one, other in zip(plain, rich, strict=True):
        for name in ("waveform", "num_samples", "utterance", "row_mask"):
            np.testing.assert_array_equal(one[name], other[name])


def test_a_corpus_without_f0_is_refused(tmp_path: pathlib.Path) -> None:
    records = [make_record(number, 5000) for number in range(4)]
    write_corpus(tmp_path / "c", {"train": records[:2], "test": records[2:]}, rate_hz=RATE_HZ)
    with pytest.raises(UserError, match=r"/c: has no F0 yet \(no .*index\.json\); run `cv2jax f0 .*/c`"):
        make_batches(tmp_path / "c")
