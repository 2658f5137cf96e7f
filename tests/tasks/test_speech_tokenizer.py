"""The tokenizer task: same loss on every mesh, batches, evaluation, facts, resume of the real model, bad corpora."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cv2jax.config import DataConfig, MeshConfig, UserError, load_config, override
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.shards import Record
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.loop import train
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps
from tests.run_record import Killed, record, stopping_at
from tests.small_corpus import SMALL_RUN, make_small_corpus

SMALL = [*SMALL_RUN, "num_steps=6", "log_every=1", "evaluate_every=3", "save_every=3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_corpus(tmp_path_factory.mktemp("corpus") / "prepared")


def small_config(corpus, *sets):
    return override(load_config("speech_tokenizer_tiny"), [f"data.corpus={corpus}", *SMALL, *sets])


def losses(corpus, workdir, mesh_config, num_devices, num_steps=3):
    config = small_config(corpus, "data.num_buckets=1")
    task = make_task(config)
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    abstract, shardings = abstract_state(task.init_state, mesh)
    steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
    state = make_state(task.init_state, shardings, jax.random.key(0))
    got = []
    for _, size, local in task.batches(0, num_steps, mesh):
        batch = global_batch(mesh, local, size)
        state, metrics = steps.for_batch(batch)(state, batch, jax.random.key(1))
        got.append((float(metrics["loss"]), int(metrics["batch_hash"])))
    assert len(steps) == len(task.batch_specs())
    return got, state, shardings


@pytest.fixture(scope="module")
def on_one_device(corpus, tmp_path_factory):
    return losses(corpus, tmp_path_factory.mktemp("one"), MeshConfig(), 1)[0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [
        (4, 1, 1),
        (1, 4, 1),
        (2, 2, 1),
        (1, 2, 2),
    ],
    ids=str,
)
def test_the_loss_is_the_same_on_every_mesh(corpus, on_one_device, tmp_path, data, fsdp, tensor):
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    got, state, shardings = losses(corpus, tmp_path, mesh, data * fsdp * tensor)
    assert [h for _, h in got] == [h for _, h in on_one_device]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in on_one_device], rtol=1e-5)
    jax.tree.map(lambda a, s: np.testing.assert_equal(a.sharding.is_equivalent_to(s, a.ndim), True), state, shardings)


def test_fsdp_and_tensor_split_the_large_parameters(corpus, tmp_path):
    config = small_config(corpus)
    task = make_task(config)
    abstract, _ = abstract_state(task.init_state, make_mesh(MeshConfig(fsdp=2, tensor=2)))
    split = {"fsdp": 0, "tensor": 0}
    for leaf in jax.tree.leaves(abstract.params):
        for axis in split:
            split[axis] += any(axis == a or (isinstance(a, tuple) and axis in a) for a in leaf.sharding.spec)
    assert split["fsdp"] >= 15
    assert split["tensor"] >= 10


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    config = small_config(corpus)
    assert train(make_task(config), config, workdir) == 0
    return workdir


@pytest.mark.slow
def test_a_run_evaluates_what_it_hears(unbroken):
    held_out = [x for x in record(unbroken) if x["kind"] == "evaluate"]
    assert [x["step"] for x in held_out] == [3, 6]
    last = held_out[-1]
    assert last["num_utterances"] == 8
    assert 0 <= last["word_accuracy"] <= 1
    assert 1 <= last["codes_used"] <= last["num_speech_tokens"]
    assert np.allclose(np.sum(last["digit_histogram"], axis=1), 1, atol=1e-3)
    assert [x[0] for x in last["examples"][:4]] == ["one", "two", "three", "four"]
    assert all(np.isfinite(x["loss"]) for x in record(unbroken) if x["kind"] == "train")


@pytest.mark.full
def test_the_real_model_resumes_bit_for_bit_and_compiles_nothing_after_the_first_step(corpus, unbroken, tmp_path):
    compiled, seen = [], []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    config = small_config(corpus)
    try:
        with pytest.raises(Killed):
            train(stopping_at(make_task(config), 4, lambda step: seen.append(len(compiled))), config, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert seen[0] > 0
    assert seen[-1] == seen[1] == len(compiled)  # steps, an evaluation and a save later
    assert train(make_task(config), config, tmp_path) == 0
    assert record(tmp_path) == record(unbroken)


@pytest.mark.slow
def test_run_json_holds_what_encode_needs(unbroken):
    facts = json.loads((unbroken / "run.json").read_text())["facts"]
    assert facts["model"]["width"] == 16
    assert facts["model"]["vocabulary_size"] == 4 + len(facts["vocabulary"])
    assert {"corpus_hash", "plan_hash"} <= set(facts)


@pytest.mark.slow
def test_another_seed_is_another_run(corpus, unbroken):
    config = small_config(corpus, "seed=1")
    with pytest.raises(UserError, match="seed: 0 → 1"):
        train(make_task(config), config, unbroken)


@pytest.mark.full
@pytest.mark.parametrize(
    "sets",
    [
        ("model.quantizer=vq", "model.codebook_size=64", "model.scan_layers=True"),
        ("model.quantizer=none",),
        ("model.pitch_weight=0.3", "model.ctc_weight=0"),
    ],
)
def test_the_options_train(corpus, tmp_path, sets):
    config = small_config(corpus, "num_steps=2", "data.num_buckets=1", "compute_dtype=bfloat16", *sets)
    assert train(make_task(config), config, tmp_path) == 0
    first, last = (x for x in record(tmp_path) if x["kind"] == "train")
    assert np.isfinite([first["loss"], last["loss"]]).all()
    evaluation = record(tmp_path)[-1]
    assert ("codes_used" in evaluation) == ("model.quantizer=none" not in sets)
    assert ("ctc_cer" in evaluation) == ("model.ctc_weight=0" not in sets)
    assert ("pitch_loss" in last) == ("model.pitch_weight=0.3" in sets)


@pytest.mark.full
def test_a_silent_utterance_and_one_shorter_than_its_text_do_not_break_a_step(tmp_path):
    def make(name, samples, text):
        wave = np.zeros(samples, np.int16)
        return Record(id=name, text=text, speaker="s", language="en", instruct=None, rate_hz=16000, waveform=wave)

    rows = [make(str(i), 1700 + 640 * i, "far too long a text for this") for i in range(8)]
    write_corpus(tmp_path / "c", {"train": rows, "test": rows[:2]}, rate_hz=16000, encoding="pcm16", shard_utterances=8)
    got, _, _ = losses(tmp_path / "c", tmp_path, MeshConfig(), 1, 2)
    assert np.isfinite([x for x, _ in got]).all()


def test_one_overlong_text_shapes_neither_batches_nor_model(tmp_path):
    rows = list(make_rows("ab"))
    rows[0] = dataclasses.replace(rows[0], text=5000 * "a")
    write_corpus(tmp_path / "c", {"train": rows, "test": rows[:4]}, rate_hz=16000, encoding="pcm16", shard_utterances=8)
    task = make_task(small_config(tmp_path / "c", "model.max_text_tokens=8"))
    assert {spec["text_tokens"].shape for spec in task.batch_specs()} == {(8, 8)}
    assert task.model_config.max_text_tokens == 8


def test_a_corpus_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="--corpus DIR"):
        make_task(load_config("speech_tokenizer_tiny"))


def test_an_unknown_task_and_an_unknown_split_are_named(corpus, tmp_path):
    config = small_config(corpus)
    with pytest.raises(UserError, match="task='vocoder' is unknown"):
        make_task(dataclasses.replace(config, task="vocoder"))
    with pytest.raises(
        UserError, match="model is a MeshConfig, and task='speech_tokenizer' needs a SpeechTokenizerConfig"
    ):
        make_task(dataclasses.replace(config, model=MeshConfig()))
    with pytest.raises(UserError, match="dev"):
        make_task(override(config, ["data.eval_split=dev"]))


@pytest.mark.full
def test_text_that_training_never_shows_is_an_error_of_the_model_and_not_of_the_run(tmp_path):
    rows = list(make_rows("ab"))
    strange = dataclasses.replace(rows[0], id="x", text="9")
    write_corpus(
        tmp_path / "c", {"train": rows, "test": [strange]}, rate_hz=16000, encoding="pcm16", shard_utterances=8
    )
    config = small_config(tmp_path / "c", "num_steps=1", "data.num_buckets=1")
    assert train(make_task(config), config, tmp_path) == 0
    assert record(tmp_path)[-1]["cer"] >= 1
    assert DataConfig().eval_split == "test"


def make_rows(text):
    random = np.random.default_rng(0)
    for i in range(8):
        wave = (1000 * random.normal(size=8000)).astype(np.int16)
        yield Record(id=str(i), text=text, speaker="s", language="en", instruct=None, rate_hz=16000, waveform=wave)
