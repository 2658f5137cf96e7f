"""The flow task: same loss on every mesh, padding and batch mates change nothing, resume, learning, what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.data.tokens import TokenWriter, read_speech_tokens
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.generate import generate
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss
from cv2jax.nn.masks import ChunkMask
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.mel_stream import MelStreams
from cv2jax.synthesis.prompt import Prompt
from cv2jax.tasks import flow_matching, make_task
from cv2jax.tasks.stages import make_mel_stage
from cv2jax.tasks.trained import load_flow
from cv2jax.train.loop import train
from tests.models.golden_flow import random_params, small_config
from tests.run_record import Killed, losses, record, stopping_at
from tests.small_flow_run import NUM_CODES, SMALL_FLOW, make_small_flow_corpus, tokens_of

SMALL = (*SMALL_FLOW, "num_steps=6", "log_every=1", "evaluate_every=3", "save_every=3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_flow_corpus(tmp_path_factory.mktemp("flow") / "corpus")


def config_of(corpus, *sets):
    given = (f"data.corpus={corpus}", f"data.speech_tokens={tokens_of(corpus)}")
    return override(load_config("flow_matching_tiny"), [*given, *SMALL, *sets])


@pytest.mark.full  # tests/multihost sees the same with every change
def test_the_loss_is_the_same_on_every_mesh(corpus):
    config = config_of(corpus, "data.num_buckets=1")
    want = losses(config, MeshConfig(), 1)
    got = losses(config, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    assert [h for _, h in got] == [h for _, h in want]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-4)


@pytest.mark.full
def test_remat_changes_nothing(corpus):
    config = config_of(corpus, "data.num_buckets=1", "model.encoder.dropout=0.0")
    want = losses(config, MeshConfig(), 1)
    got = losses(override(config, ["model.remat=full"]), MeshConfig(), 1)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5)


@pytest.mark.full
def test_rows_fit_the_kernel_and_its_loss_is_that_of_the_plain_path(corpus, monkeypatch):
    config = config_of(corpus, "data.num_buckets=1", "model.attention=splash", "model.encoder.dropout=0.0")
    got = losses(config, MeshConfig(), 1)
    monkeypatch.setattr(flow_matching, "FlowMatching", lambda config, impl="xla": FlowMatching(config))
    want = losses(config, MeshConfig(), 1)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5)


def test_padding_and_batch_mates_change_no_row():
    config = small_config(mask_chunks=(0, 3), mask_lefts=(-1, 4), mask_prompts=(0, 2))
    model, params = FlowMatching(config), random_params(config)
    rng = np.random.default_rng(0)
    num_tokens = jnp.array([7, 3, 5, 0])
    batch = {
        "speech_tokens": jnp.asarray(rng.integers(0, 40, (4, 7)), jnp.int32),
        "num_tokens": num_tokens,
        "mel": jnp.asarray(rng.normal(size=(4, 14, 8)), jnp.float32),
        "speaker_embedding": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
    }
    draws = draw(config, jax.random.key(3), num_tokens, 7)
    run = jax.jit(lambda batch: flow_loss(model, params, batch, draws))
    loss, error = run(batch)
    valid = np.arange(14) < 2 * np.asarray(num_tokens)[:, None]
    garbage = batch | {
        "speech_tokens": jnp.where(valid[:, ::2], batch["speech_tokens"], 39),
        "mel": jnp.where(valid[..., None], batch["mel"], jnp.nan),
    }
    other_loss, other = run(garbage)
    np.testing.assert_array_equal(np.asarray(error)[valid], np.asarray(other)[valid])
    assert float(loss) == float(other_loss)
    assert float(loss) == pytest.approx(float(np.asarray(error)[valid].mean()), rel=1e-5)
    alone = {name: array.at[1:].set(0) for name, array in batch.items()}
    np.testing.assert_allclose(run(alone)[1][0], error[0], atol=1e-5)


@pytest.mark.full
def test_a_killed_run_resumes_bit_for_bit(corpus, tmp_path):
    config = config_of(corpus, "data.num_buckets=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(make_task(config), config, whole) == 0
    with pytest.raises(Killed):
        train(stopping_at(make_task(config), 4), config, broken)
    assert train(make_task(config), config, broken) == 0
    assert record(broken) == record(whole)


@pytest.mark.slow
def test_it_learns_reports_what_is_heard_and_is_streamed(corpus, tmp_path):
    sets = ("optimizer.learning_rate=0.02", "num_steps=30", "evaluate_every=30", "save_every=30")
    config = config_of(corpus, "data.num_buckets=1", *sets)
    assert train(make_task(config), config, tmp_path) == 0
    lines = record(tmp_path)
    steps, [last] = ([line for line in lines if line["kind"] == kind] for kind in ("train", "evaluate"))
    losses = [line["loss"] for line in steps]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert all(0 < line["velocity_loss"] < line["loss"] for line in steps)  # behind it stands that of the prior
    assert last["seen_share"] > 0.5
    assert {"offline_mel_l1", "streamed_mel_l1", "streamed_difference", "offline_ratio", "streamed_ratio"} <= set(last)
    assert sum(name.startswith("loss_time_") for name in last) >= 2
    model_config, params = load_flow(tmp_path, make_mesh(MeshConfig()))
    assert model_config == make_task(config).model_config
    mask, key, tokens = ChunkMask(chunk=25), jax.random.key(0), np.arange(60, dtype=np.int32) % NUM_CODES
    speaker = np.ones(8, np.float32)
    batch = {"speech_tokens": tokens[None], "num_tokens": np.array([60]), "speaker_embedding": speaker[None]}
    [want] = generate(
        FlowMatching(model_config), params, jax.device_put(batch), key[None], mask
    )  # as evaluations stream
    streams = MelStreams(make_mel_stage(model_config, params), mask)
    stream = streams.start(streams.enroll(Prompt(speaker_embedding=speaker)), key)
    got = [stream.hop(tokens[:25], tokens[25:28]), stream.hop(tokens[25:50], tokens[50:53]), stream.hop(tokens[50:])]
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=1e-4)


def test_tokens_of_an_unknown_codebook_are_refused(corpus, tmp_path):
    path = tmp_path / "tokens.npz"
    with TokenWriter(path, {"tokenizer": "abc"}) as writer:
        for identity, tokens in read_speech_tokens(tokens_of(corpus)):
            writer.write(identity, "a.wav", tokens, num_frames=len(tokens), seconds=1.0)
    with pytest.raises(UserError, match="does not say how many codes its tokenizer has; run `cv2jax encode` again"):
        make_task(config_of(corpus, f"data.speech_tokens={path}"))


def test_a_run_of_another_stage_is_no_flow(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"task": "speech_tokenizer"}, "facts": {"model": {}}}))
    with pytest.raises(UserError, match="is a run of speech_tokenizer; give the --workdir of a flow_matching"):
        load_flow(tmp_path, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("data.speech_tokens=",), "data.speech_tokens is not set"),
        (("model.num_speech_tokens=9",), "has tokens up to 26"),
        (("model.num_mels=40",), "the features have 80 bins"),
        (("model.attention=splash", "model.mask_prompts=(0,0,-1,0)"), "-1 is drawn, and kernels need numbers"),
        (("model.attention=splash", "model.mask_per=batch"), "dealt out to utterances"),
        (("model.attention=splash", "data.batch_multiple=1", "data.batch_seconds=7"), "cannot be dealt out to 4 masks"),
        (("lora.rank=2",), "is for the language model"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, sets, message):
    with pytest.raises(UserError, match=message):
        make_task(config_of(corpus, *sets))
