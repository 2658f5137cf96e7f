"""What stages take from trained runs: parameters merged, averaged, sharded and checked; a recogniser that reads tokens."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import LoraConfig, MeshConfig, OptimizerConfig, UserError, to_dict
from cv2jax.models.speech_tokenizer.decode import transcribe_tokens
from cv2jax.models.speech_tokenizer.tokenize import tokenizer_hash
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks.trained import TokenReader, find_step, load_params
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.lora import LORA, add_lora, save_lora, trained_by
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, init_train_state
from tests.models.small_tokenizer import make_variables, small

LORA_CONFIG = LoraConfig(rank=3, alpha=1.5, targets=("query",), also_trained=("bias",))
AVERAGED = OptimizerConfig(ema_decay=0.5)


def init(key, width=6, outputs=4):
    def leaf(axes, *shape):
        return nn.with_logical_partitioning(nn.initializers.normal(), axes)(key, shape)

    return {
        "query": {"kernel": leaf(("embed", "mlp"), width, outputs)},
        "out": {"kernel": leaf(("mlp", "embed"), outputs, width)},
        "bias": leaf(("vocab",), outputs),
    }


def write_run(workdir, states, config=None, facts=None):
    """A workdir as `cv2jax train` leaves it, of {step: state}."""
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    (workdir / "run.json").write_text(json.dumps({"config": config or {}, "facts": facts or {}}))


def make_run(workdir, lora=LORA_CONFIG, optimizer=AVERAGED, steps=(4,)):
    """{step: state} with random numbers everywhere, of the toy model."""

    def init_state(key):
        return init_train_state(add_lora(init(key), lora, key), {}, make_optimizer(optimizer, 9), trained_by(lora))

    shapes, states = nn.unbox(jax.eval_shape(init_state, jax.random.key(0))), {}
    for step in steps:
        rng = np.random.default_rng(step)
        states[step] = jax.tree.map(lambda a, r=rng: jnp.asarray(r.normal(size=a.shape).astype(a.dtype)), shapes)
    write_run(workdir, states, {"lora": to_dict(lora), "optimizer": to_dict(optimizer), "num_steps": 9})
    return states


def mesh(num_devices=1):
    return make_mesh(MeshConfig(fsdp=num_devices), jax.devices()[:num_devices])


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b)))


@pytest.mark.parametrize("ema", [False, True])
def test_factors_are_merged_into_the_sharded_parameters(tmp_path, ema):
    state = make_run(tmp_path)[4]
    trained = state.opt_state[-1].ema_params if ema else state.params
    params, described = load_params(str(tmp_path), init, mesh(2), ema=ema)
    assert described["config"]["num_steps"] == 9
    assert set(params) == {"query", "out", "bias"}
    a, b = (np.asarray(trained[LORA]["query"]["kernel"][name]) for name in "ab")
    np.testing.assert_allclose(params["query"]["kernel"], state.params["query"]["kernel"] + 0.5 * a @ b, atol=1e-6)
    assert same(params["bias"], trained["bias"])
    assert same(params["out"], state.params["out"])
    assert params["query"]["kernel"].sharding.spec[0] == "fsdp"
    apart, _ = load_params(str(tmp_path), init, mesh(), ema=ema, merge=False)
    assert same(apart, state.params | {LORA: trained[LORA], "bias": trained["bias"]})


@pytest.mark.parametrize("base_lora", [LoraConfig(), LORA_CONFIG])
@pytest.mark.parametrize("ema", [False, True])
def test_a_side_file_is_merged_over_what_it_was_trained_on(tmp_path, base_lora, ema):
    """Of a run with factors of its own these are merged first, as for a run that starts from it."""
    make_run(tmp_path, base_lora)
    base, _ = load_params(tmp_path, init, mesh(), ema=ema)
    lora, rng = LoraConfig(rank=2, alpha=3.0, targets=("out",)), np.random.default_rng(8)
    boxed = jax.eval_shape(lambda key: add_lora(init(key), lora, key), jax.random.key(0))[LORA]
    factors = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), nn.unbox(boxed))
    path = tmp_path / "side.safetensors"
    save_lora(path, base | {LORA: factors}, lora)
    want = np.asarray(base["out"]["kernel"]) + 1.5 * factors["out"]["kernel"]["a"] @ factors["out"]["kernel"]["b"]
    for devices, merge in ((2, True), (1, False)):
        params, _ = load_params(tmp_path, init, mesh(devices), ema=ema, merge=merge, lora_file=str(path))
        np.testing.assert_allclose(params["out"]["kernel"], want, atol=1e-5)
        assert same(params | {"out": 0}, base | {"out": 0})
    assert params["out"]["kernel"].sharding.is_equivalent_to(base["out"]["kernel"].sharding, 2)
    with pytest.raises(UserError, match=r"side.safetensors does not fit: base: "):
        load_params(tmp_path, init, mesh(), ema=not ema, lora_file=str(path))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_without_factors_and_its_average_if_it_keeps_one(tmp_path, decay):
    states = make_run(tmp_path, LoraConfig(), OptimizerConfig(ema_decay=decay), steps=(2, 10))
    for step, state in states.items():
        average = state.opt_state[-1].ema_params if decay else state.params
        for ema, want in ((False, state.params), (True, average)):
            assert same(load_params(tmp_path, init, mesh(), step=step, ema=ema)[0], want)
    assert same(load_params(tmp_path, init, mesh())[0], states[10].params)  # the newest
    assert find_step(tmp_path) == 10
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*checkpoints; choose one of 2, 10"):
        find_step(tmp_path, 3)


def test_another_model_is_told_with_all_that_differs(tmp_path):
    make_run(tmp_path)
    for ema in (False, True):
        with pytest.raises(UserError, match=r"checkpoints/4 is of another model") as error:
            load_params(tmp_path, lambda key: init(key, width=7), mesh(), ema=ema)
        assert "\n" not in str(error.value)
        for path, ours, theirs in (("query", (7, 4), (6, 4)), ("out", (4, 7), (4, 6))):
            assert f"params/{path}/kernel: model {ours}, checkpoint {theirs}" in str(error.value)
        assert "bias" not in str(error.value)


def test_no_run_and_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_params(tmp_path / "nowhere", init, mesh())
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "facts": {}}))
    with pytest.raises(UserError, match=r"no checkpoint in .*; train first"):
        load_params(tmp_path, init, mesh())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


CHARACTERS = list("abcdefgh")


@pytest.fixture(scope="module", params=["fsq", "vq"])
def reader_run(request, tmp_path_factory):
    """(workdir, config, params, model_state) of a speech tokenizer."""
    config = small(quantizer=request.param)
    params, model_state = make_variables(config, seed=6)
    rng = np.random.default_rng(6)
    model_state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), model_state)
    params["encoder2"] = jax.tree.map(lambda a: 3 * a, params["encoder2"])
    decoder = params["decoder"]  # heeds what was said, and says the end now and then
    for name in ("cross_value", "cross_out"):
        decoder["blocks_0"][name]["kernel"] *= 6
    decoder["final_norm"]["bias"] += 0.3 * decoder["embedding"]["table"][2]
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, num_skipped=zero, params=params, opt_state={}, model_state=model_state)
    workdir = tmp_path_factory.mktemp("runs") / request.param
    facts = {"model": dataclasses.asdict(config) | {"dtype": "bfloat16"}, "vocabulary": CHARACTERS}
    write_run(workdir, {3: state}, facts=facts)
    return workdir, config, params, model_state


def test_tokens_are_read_as_the_recogniser_hears_them_alone(reader_run):
    workdir, config, params, model_state = reader_run
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, config.num_codes, n).astype(np.int32) for n in (9, 0, 9, 9)]
    reader = TokenReader(str(workdir), tokenizer_hash(config, params, model_state))
    heard = reader.read(rows)
    assert heard[1] == ""
    assert len(set(heard)) > 2
    alone = jax.jit(transcribe_tokens, static_argnums=(0, 4))
    for row, text in zip(rows, heard, strict=True):
        if len(row):
            counts = jnp.array([len(row)])
            ids, count = alone(config, params, jnp.asarray(row[None]), counts, config.max_text_tokens, model_state)
            assert text == "".join("?" if i == 3 else CHARACTERS[i - 4] for i in ids[0, : int(count[0])] if i > 2)


def test_a_run_that_cannot_read_is_refused(reader_run, tmp_path):
    workdir = reader_run[0]
    with pytest.raises(UserError, match=r"data.speech_tokenizer=.*its tokenizer \w{12} did not make .* of 0{12}; give"):
        TokenReader(str(workdir), "0" * 64)
    with pytest.raises(UserError, match="nowhere holds no run"):
        TokenReader(str(tmp_path / "nowhere"), "0" * 64)
    facts = json.loads((workdir / "run.json").read_text())["facts"]
    for name, model, message in (
        ("without", facts["model"] | {"quantizer": "none"}, "no run of a speech tokenizer with a codebook"),
        ("lm", {"num_speech_tokens": 27}, "no run of a speech tokenizer with a codebook"),
        ("young", facts["model"], "no checkpoint in"),
    ):
        (tmp_path / name).mkdir()
        described = {"config": {}, "facts": facts | {"model": model}}
        (tmp_path / name / "run.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match=message) as error:
            TokenReader(str(tmp_path / name), "0" * 64)
        assert "\n" not in str(error.value)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["run.json"]
