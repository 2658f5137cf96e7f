"""The speaker task: same loss and state on every mesh, resume, learning to tell voices apart, what it refuses and warns of."""

import json

import jax
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.jobs.report import write_report
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.loop import train
from tests.run_record import Killed, first_steps, record, stopping_at
from tests.small_speaker_run import SMALL_SPEAKER, make_speaker_corpus

SMALL = (*SMALL_SPEAKER, "num_steps=6", "log_every=1", "evaluate_every=3", "save_every=3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_speaker_corpus(tmp_path_factory.mktemp("speaker") / "corpus", lone=True)


def config_of(corpus, *sets):
    return override(load_config("speaker_encoder_tiny"), [f"data.corpus={corpus}", *SMALL, *sets])


@pytest.mark.full  # with every change, tests/models sees the statistics of a mesh
def test_loss_and_statistics_are_the_same_on_every_mesh(corpus):
    config = config_of(corpus, "model.speeds=(0.9,1.0)")
    want, state = first_steps(config, MeshConfig(), 1)
    got, other = first_steps(config, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    assert [m["batch_hash"] for m in got] == [m["batch_hash"] for m in want]
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=1e-4)
    state, other = state.model_state, other.model_state
    assert int(state["num_batches"]) == int(other["num_batches"]) == 2
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state["norms"]), jax.tree.leaves(other["norms"]), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.full
def test_a_killed_run_resumes_bit_for_bit_with_its_statistics(corpus, tmp_path):
    config = config_of(corpus)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(make_task(config), config, whole) == 0
    with pytest.raises(Killed):
        train(stopping_at(make_task(config), 4), config, broken)
    assert train(make_task(config), config, broken) == 0
    assert record(broken) == record(whole)
    abstract, _ = abstract_state(make_task(config).init_state, make_mesh(config.mesh))
    states = []
    for workdir in (whole, broken):
        with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
            states.append(jax.device_get(checkpoints.load(abstract)))
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))
    margins = [line["margin"] for line in record(whole) if line["kind"] == "train"]
    assert margins[:3] == [0, 0, 0]
    assert 0 < margins[3] < margins[4] < margins[5] == pytest.approx(0.2)  # six batches came before: step 5 is the end


@pytest.mark.slow
def test_it_learns_to_tell_voices_apart_and_reports_it(corpus, tmp_path, caplog):
    sets = ("num_steps=120", "evaluate_every=20", "save_every=120", "optimizer.learning_rate=0.01", "model.margin=0.0")
    config = config_of(corpus, *sets, "model.noise_share=0.0", "model.head_channels=4", "data.batch_seconds=16")
    task = make_task(config)
    assert "1 speakers have a single utterance to train on: hermit" in caplog.text
    assert train(task, config, tmp_path) == 0
    lines = record(tmp_path)
    steps, evaluations = ([line for line in lines if line["kind"] == kind] for kind in ("train", "evaluate"))
    assert np.mean([line["accuracy"] for line in steps[-5:]]) > 0.9
    assert np.mean([line["loss"] for line in steps[-5:]]) < 0.5 * steps[0]["loss"]
    assert any(line["num_left_out"] for line in steps)  # the silent utterance
    last = evaluations[-1]
    assert last["eer"] <= evaluations[0]["eer"] <= 0.5
    assert last["eer"] < 0.1
    assert last["same_cosine"] > last["different_cosine"]
    assert (last["num_left_out"], last["num_utterances"], last["lone_speakers"]) == (1, 13, ["hermit"])
    facts = json.loads((tmp_path / "run.json").read_text())["facts"]
    assert facts["num_speakers"] == 5
    assert facts["model"]["embedding_dim"] == 8
    assert facts["features"]["rate_hz"] == 16_000
    page = write_report(tmp_path).read_text()
    assert "equal-error rate, held-out pairs" in page
    assert "Held-out pairs" in page


def test_a_corpus_of_one_speaker_teaches_nothing(tmp_path):
    corpus = make_speaker_corpus(tmp_path / "corpus", 8, 4)
    names = tmp_path / "corpus" / "index" / "train.speaker.npy"
    np.save(names, np.zeros(8, np.int32))
    with pytest.raises(UserError, match=r"split train has one speaker \(s0\), and two or more are told apart"):
        make_task(config_of(corpus))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("model.num_mels=40",), "the features have 80 bins"),
        (("lora.rank=2",), "lora.rank=2: is not for the speaker encoder"),
        (("optimizer.ema_decay=0.9",), "is not for the speaker encoder"),
        (("init_from=runs/a",), "trains from scratch"),
        (("model.growth=0",), "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, sets, message):
    with pytest.raises(UserError, match=message):
        make_task(config_of(corpus, *sets))
