"""The flow on real speaker embeddings: what it is given, what its run says of them, what it refuses, that it trains."""

import json

import jax
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.data.embeddings import save_embeddings
from cv2jax.data.shards import Corpus
from cv2jax.data.speaker_vectors import SpeakerVectors
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks import flow_matching, make_task
from cv2jax.train.loop import train
from cv2jax.train.run import save_or_compare
from tests.run_record import first_steps, record
from tests.small_flow_run import SMALL_FLOW, make_small_flow_corpus, tokens_of

ENCODER, SIZE = "e" * 64, 8
SMALL = (*SMALL_FLOW, "data.num_buckets=1", "num_steps=2", "log_every=1", "evaluate_every=2", "save_every=2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_flow_corpus(tmp_path_factory.mktemp("embedded") / "corpus")


def ids_of(corpus):
    splits = (Corpus(corpus).split(name) for name in ("train", "test"))
    return [split.read(row).id for split in splits for row in range(len(split))]


def write(corpus, name, seed=0, size=SIZE, leave_out=0):
    """A file beside the corpus, and id → vector."""
    ids = ids_of(corpus)[leave_out:]
    vectors = np.random.default_rng(seed).normal(size=(len(ids), size)).astype(np.float32)
    path = corpus.with_name(name)
    save_embeddings(path, ids, ["s"] * len(ids), vectors, {"encoder": ENCODER})
    return path, dict(zip(ids, vectors, strict=True))


@pytest.fixture(scope="module")
def embedded(corpus):
    return write(corpus, "e.npz")


def config_of(corpus, path="", *sets):
    given = (f"data.corpus={corpus}", f"data.speech_tokens={tokens_of(corpus)}", f"data.speaker_embeddings={path}")
    return override(load_config("flow_matching_tiny"), [*SMALL, *given, *sets])


def prepared(task):
    """(ids, what the model is given, but for mel, which takes long to compile) of the first batch."""
    [(step, _, batch)] = task.batches(0, 1, make_mesh(MeshConfig(), jax.devices()[:1]))
    silence = lambda waveform, num_samples, num_speech, *_: (np.zeros((len(waveform), 2, 80)), num_speech)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_matching, "mel_features", silence)
        shown = task.prepare({name: jax.numpy.asarray(array) for name, array in batch.items()})
    return task.utterance_ids(step), jax.device_get(shown)


def test_the_model_is_given_the_embeddings_of_the_file(corpus, embedded):
    path, vectors = embedded
    ids, shown = prepared(make_task(config_of(corpus, path)))
    np.testing.assert_array_equal(shown["speaker_embedding"], np.stack([vectors[identity] for identity in ids]))
    ids, shown = prepared(make_task(config_of(corpus, path, "data.embedding_of=speaker")))
    mean = np.stack(list(vectors.values())).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(shown["speaker_embedding"], np.tile(mean, (len(ids), 1)), rtol=1e-6)
    _, shown = prepared(make_task(config_of(corpus)))
    np.testing.assert_allclose(np.linalg.norm(shown["speaker_embedding"], axis=1), 1, rtol=1e-6)
    assert (shown["speaker_embedding"] == shown["speaker_embedding"][0]).all()  # one speaker, one name


def test_an_utterance_without_an_embedding_counts_no_frames(corpus):
    path, vectors = write(corpus, "few.npz", leave_out=20)
    ids, shown = prepared(make_task(config_of(corpus, path)))
    has = [identity in vectors for identity in ids]
    assert (shown["num_tokens"] > 0).tolist() == has
    assert 0 < sum(has) < len(has)


def test_a_run_says_on_what_it_was_trained(corpus, embedded):
    path, _ = embedded
    for of in ("utterance", "speaker"):
        facts = make_task(config_of(corpus, path, f"data.embedding_of={of}")).facts()
        assert facts["speaker_embeddings"] == {"encoder": ENCODER, "of": of}
        assert facts["speaker_embeddings_hash"] == SpeakerVectors(path, of).hash
    facts = make_task(config_of(corpus)).facts()
    assert facts["speaker_embeddings"] == "stand-in"
    assert "speaker_embeddings_hash" not in facts


def test_a_run_goes_on_with_its_own_file_alone(corpus, embedded, tmp_path):
    path, _ = embedded
    config = config_of(corpus, path)
    save_or_compare(tmp_path, config, make_task(config).facts(), started=False, write=True)

    def resume(*arguments):
        config = config_of(corpus, *arguments)
        save_or_compare(tmp_path, config, make_task(config).facts(), started=True, write=True)

    path.with_name("moved.npz").write_bytes(path.read_bytes())
    resume(path.with_name("moved.npz"))  # the same wherever it lies
    with pytest.raises(UserError, match=r"data: speaker_embeddings_hash: '\w+' → '\w+…\); use the same config"):
        resume(write(corpus, "other.npz", seed=1)[0])
    with pytest.raises(UserError, match=r"data\.embedding_of: 'utterance' → 'speaker'; data: speaker_embeddings\.of"):
        resume(path, "data.embedding_of=speaker")
    with pytest.raises(
        UserError, match=r"data: speaker_embeddings: \{.*; data: speaker_embeddings_hash: '.*' → 'absent'"
    ):
        resume()


def test_a_run_of_before_there_was_a_choice_goes_on_with_stand_ins(corpus, embedded, tmp_path):
    config = config_of(corpus)
    save_or_compare(tmp_path, config, make_task(config).facts(), started=False, write=True)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["facts"]["speaker_embeddings"], run["config"]["data"]["speaker_embeddings"]
    del run["config"]["data"]["embedding_of"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    save_or_compare(tmp_path, config, make_task(config).facts(), started=True, write=True)
    config = config_of(corpus, embedded[0])
    with pytest.raises(UserError, match=r"data: speaker_embeddings: 'stand-in' → \{"):
        save_or_compare(tmp_path, config, make_task(config).facts(), started=True, write=True)


def test_embeddings_of_another_size_are_refused(corpus):
    path, _ = write(corpus, "large.npz", size=6)
    with pytest.raises(UserError, match=r"large\.npz: has embeddings of 6, and model\.speaker_dim=8; set that to 6"):
        make_task(config_of(corpus, path))
    assert make_task(config_of(corpus, path, "model.speaker_dim=6")).model_config.speaker_dim == 6


@pytest.mark.full
def test_it_trains_and_evaluates_on_them(corpus, embedded, tmp_path):
    config = config_of(corpus, embedded[0])
    assert train(make_task(config), config, tmp_path / "run") == 0
    first, second, judged = record(tmp_path / "run")
    assert [line["kind"] for line in (first, second, judged)] == ["train", "train", "evaluate"]
    assert np.isfinite([first["loss"], second["loss"], judged["offline_mel_l1"]]).all()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["speaker_embeddings"]["encoder"] == ENCODER


@pytest.mark.full
def test_every_mesh_trains_the_same(corpus, embedded):
    config = config_of(corpus, embedded[0])
    want, got = (first_steps(config, MeshConfig(**m), n)[0] for m, n in (({}, 1), ({"data": 2, "fsdp": 2}, 4)))
    assert [int(m["batch_hash"]) for m in got] == [int(m["batch_hash"]) for m in want]
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=1e-4)
