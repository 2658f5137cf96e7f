"""The language model task: same loss on every mesh, packed = unpacked, resume, what it evaluates, where it starts from."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.convert.qwen import save_backbone
from cv2jax.data.packed_batch import bistream_coins
from cv2jax.data.token_corpus import TokenCorpus
from cv2jax.models.speech_tokenizer.tokenize import tokenizer_hash
from cv2jax.models.text_speech_lm.loss import next_token_loss, packed_loss
from cv2jax.models.text_speech_lm.model import TextSpeechLm, init_params
from cv2jax.models.text_speech_lm.sequence import build_mixed_row, collate
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.text.tokenizer import load_text_tokenizer
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.loop import train
from cv2jax.train.lora import LORA
from cv2jax.train.state import TrainState, make_state
from cv2jax.train.step import compile_steps
from tests.models.small_tokenizer import make_variables, small
from tests.run_record import Killed, record, stopping_at
from tests.small_token_corpus import NUM_CODES, SMALL_LM, make_small_token_corpus

SMALL = [*SMALL_LM, "num_steps=6", "log_every=1", "evaluate_every=3", "save_every=3", "evaluate_utterances=4"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def small_config(corpus, *sets):
    return override(load_config("text_speech_lm_tiny"), [f"data.corpus={corpus}", *SMALL, *sets])


def start(config, mesh):
    task = make_task(config)
    _, shardings = abstract_state(task.init_state, mesh)
    return task, task.warm_start(make_state(task.init_state, shardings, jax.random.key(0)))


def first_steps(config, mesh_config, num_devices, num_steps=3):
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    task, state = start(config, mesh)
    abstract, shardings = abstract_state(task.init_state, mesh)
    steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
    first, got = jax.device_get(state.params), []
    for _, size, local in task.batches(0, num_steps, mesh):
        batch = global_batch(mesh, local, size)
        state, metrics = steps.for_batch(batch)(state, batch, jax.random.key(1))
        got.append((float(metrics["loss"]), int(metrics["batch_hash"])))
    return got, first, state


@pytest.fixture(scope="module")
def on_one_device(corpus):
    return first_steps(small_config(corpus), MeshConfig(), 1)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"),
    [pytest.param(4, 1, 1, marks=pytest.mark.full), pytest.param(1, 4, 1, marks=pytest.mark.full), (1, 2, 2)],
)
def test_the_loss_is_the_same_on_every_mesh(corpus, on_one_device, data, fsdp, tensor):
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    got, _, _ = first_steps(small_config(corpus), mesh, data * fsdp * tensor)
    assert [h for _, h in got] == [h for _, h in on_one_device[0]]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in on_one_device[0]], rtol=1e-5)


@pytest.mark.slow
def test_scan_remat_chunks_and_layout_of_the_loss_change_nothing(corpus, on_one_device):
    sets = ("model.backbone.remat=full", "model.loss_chunk=48")
    got, _, _ = first_steps(small_config(corpus, *sets), MeshConfig(), 1)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in on_one_device[0]], rtol=1e-5)


@pytest.mark.slow
def test_packed_rows_have_the_loss_of_rows_of_their_own(corpus, on_one_device):
    task = make_task(small_config(corpus))
    _, _, packed = next(task.batches(0, 1, make_mesh(MeshConfig(), jax.devices()[:1])))
    utterances = packed["utterance"][packed["utterance"] >= 0].astype(np.int64)
    split, model = TokenCorpus(corpus).split("train"), task.model_config
    options = {
        "text_vocabulary_size": model.backbone.vocabulary_size,
        "num_speech_tokens": NUM_CODES,
        "max_length": 128,
    }
    coins = bistream_coins(0, 0, utterances)
    rows = [
        build_mixed_row(split.read(int(u)), coin, ratio=model.ratio, **options)
        for u, coin in zip(utterances, coins.tolist(), strict=True)
    ]
    batch = {name: jnp.asarray(array) for name, array in collate(rows, 64).items()}
    positions, mask = jnp.broadcast_to(jnp.arange(64), batch["token"].shape), jnp.tril(jnp.ones((64, 64), bool))
    params = jax.tree.map(jnp.asarray, on_one_device[1])
    arrays = (batch["token"], batch["kind"], positions, mask[None, None])
    logits = TextSpeechLm(model).apply({"params": params}, *arrays).logits
    loss, metrics = next_token_loss(logits, batch["targets"], num_speech_tokens=NUM_CODES)
    assert int(metrics["num_targets"]) == int(np.sum(packed["targets"] >= 0))
    assert len(rows) > len(packed["targets"])
    together, _ = packed_loss(model, params, {name: jnp.asarray(array) for name, array in packed.items()})
    np.testing.assert_allclose(float(together), float(loss), rtol=1e-5)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    config = small_config(corpus)
    assert train(make_task(config), config, workdir) == 0
    return workdir


@pytest.mark.slow
def test_a_run_evaluates_what_it_predicts_and_what_it_says(unbroken):
    held_out = [x for x in record(unbroken) if x["kind"] == "evaluate"]
    assert [x["step"] for x in held_out] == [3, 6]
    last = held_out[-1]
    assert last["num_eos"] == 4
    assert 0 < last["eos_probability_at_eos"] < 1
    assert 0 <= last["digit_accuracy_2"] <= 1
    for prefix in ("", "streamed_"):
        assert last[f"{prefix}length_error"] >= 0
        assert 0 <= last[f"{prefix}hit_limit"] <= 4
        assert last[f"{prefix}non_finite"] == 0
    assert "cer" not in last  # without the speech tokenizer nobody reads


@pytest.mark.full
def test_what_is_said_is_heard_on_a_mesh_of_many_devices(tmp_path):
    config = small(fsq_dim=3, vocabulary_size=31)
    params, model_state = make_variables(config, seed=4)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, num_skipped=zero, params=params, opt_state={}, model_state=model_state)
    with Checkpoints(tmp_path / "tokenizer" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, state)
    facts = {"model": dataclasses.asdict(config), "vocabulary": list(" 'abcdefghijklmnopqrstuvwxy")}
    (tmp_path / "tokenizer" / "run.json").write_text(json.dumps({"config": {}, "facts": facts}))
    made_by = tokenizer_hash(config, params, model_state)
    corpus = make_small_token_corpus(tmp_path / "tokens", speech_tokenizer=made_by)
    run = small_config(corpus, f"data.speech_tokenizer={tmp_path / 'tokenizer'}", "num_steps=1", "mesh.fsdp=2")
    assert train(make_task(run), run, tmp_path / "lm") == 0
    (last,) = [x for x in record(tmp_path / "lm") if x["kind"] == "evaluate"]
    assert last["cer"] >= 0
    assert last["streamed_cer"] >= 0
    assert len(last["examples"]) == 4
    assert load_text_tokenizer(tmp_path / "lm" / "text_tokenizer").hash == TokenCorpus(corpus).metadata.text_tokenizer


ADAPTED = ("optimizer.ema_decay=0.9", "lora.rank=2", "lora.also_trained=('head_kernel',)")


@pytest.mark.full
@pytest.mark.parametrize("sets", [(), ADAPTED])
def test_a_killed_run_resumes_bit_for_bit(corpus, unbroken, tmp_path, sets):
    config = small_config(corpus, *sets)
    whole, broken = tmp_path / "whole" if sets else unbroken, tmp_path / "broken"
    assert train(make_task(config), config, whole) == 0
    with pytest.raises(Killed):
        train(stopping_at(make_task(config), 4), config, broken)
    assert train(make_task(config), config, broken) == 0
    assert record(broken) == record(whole)


@pytest.mark.slow
def test_low_rank_factors_alone_are_trained(corpus):
    _, first, state = first_steps(small_config(corpus, "lora.rank=2"), MeshConfig(), 1)
    now = jax.device_get(state.params)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, now)
    assert not any(jax.tree.leaves({k: v for k, v in changed.items() if k != LORA}))
    assert all(jax.tree.leaves(changed[LORA]))


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(corpus, unbroken):
    sets = (f"init_from={unbroken}", "optimizer.ema_decay=0.5")
    got, _, _ = first_steps(small_config(corpus, *sets), MeshConfig(fsdp=2), 2, num_steps=1)
    after = [x["loss"] for x in record(unbroken) if x["kind"] == "train"]
    assert got[0][0] < after[0]
    assert got[0][0] == pytest.approx(after[-1], abs=0.3)


@pytest.mark.slow
def test_a_run_starts_from_a_hugging_face_backbone(corpus, tmp_path):
    config = small_config(corpus)
    task = make_task(config)
    params = nn.unbox(init_params(task.model_config, jax.random.key(7)))
    save_backbone(params, task.model_config.backbone, tmp_path / "hf")
    shutil.copytree(corpus / "text_tokenizer", tmp_path / "hf", dirs_exist_ok=True)
    _, state = start(small_config(corpus, f"init_from={tmp_path / 'hf'}"), make_mesh(MeshConfig(), jax.devices()[:1]))
    got = state.params
    np.testing.assert_array_equal(got["text_embedding"], params["text_embedding"])
    jax.tree.map(np.testing.assert_array_equal, got["backbone"], dict(params["backbone"]))
    assert not np.array_equal(got["head_kernel"], params["head_kernel"])


@pytest.mark.slow
def test_bad_input_is_one_line(corpus, unbroken, tmp_path):
    other = make_small_token_corpus(tmp_path / "other", seed=5)
    cases = [
        (small_config(corpus, "model.num_speech_tokens=9"), r"num_speech_tokens=9.*27 tokens"),
        (
            small_config(corpus, "model.backbone.vocabulary_size=100"),
            r"vocabulary_size=100: the corpus .* has \d{3} tokens; set that",
        ),
        (small_config(corpus, "data.row_length=8"), r"no utterance .* is left to pack"),
        (small_config(corpus, "data.prefix=speaker"), r"prefix none; tokenize it again with --prefix speaker"),
        (small_config("", "data.corpus="), r"data.corpus is not set.*cv2jax tokenize"),
        (small_config(tmp_path / "nowhere"), r"nowhere"),
        (small_config(corpus, "data.speech_tokenizer=nowhere"), r"nowhere holds no run"),
        (
            small_config(corpus, "model.attention=cudnn"),
            r"attention=cudnn: needs a GPU and bfloat16, not cpu and float32",
        ),
        (
            small_config(corpus, "model.attention=splash", "data.row_length=200"),
            r"row_length=200 must be a multiple of 128",
        ),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message) as error:
            make_task(config)
        assert "\n" not in str(error.value)
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "run.json").write_text(json.dumps({"config": {"task": "speech_tokenizer"}, "facts": {}}))
    for corpus_, place, message in (
        (other, unbroken, "its hash .* differs from"),
        (corpus, tmp_path / "empty", r"neither the --workdir of .* nor the directory of a Qwen2"),
        (corpus, tmp_path / "other", r"neither the --workdir of .* nor the directory of a Qwen2"),
        (corpus, stage, "is a run of speech_tokenizer; give the --workdir of a text_speech_lm"),
    ):
        with pytest.raises(UserError, match=message):
            start(small_config(corpus_, f"init_from={place}"), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_facts_name_both_tokenizers_and_fit_json(corpus):
    facts = json.loads(json.dumps(make_task(small_config(corpus)).facts()))
    metadata = TokenCorpus(corpus).metadata
    assert facts["text_tokenizer"] == metadata.text_tokenizer
    assert facts["speech_tokenizer"] == metadata.speech_tokenizer
    assert facts["model"]["backbone"]["vocabulary_size"] == metadata.vocabulary_size
    moved = dataclasses.replace(small_config(corpus), num_steps=9)
    assert make_task(moved).facts()["plan_hash"] == facts["plan_hash"]
