"""A run starts from another whose layers are kept in the other form, and in its own."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import LoraConfig, MeshConfig, TrainConfig, UserError, to_dict
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from cv2jax.nn.stack import match_layers
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks.trained import load_params
from cv2jax.tasks.warm_start import load_initial, load_initial_flow
from cv2jax.text.tokenizer import train_text_tokenizer
from cv2jax.train.lora import add_lora, effective_params, save_lora
from cv2jax.train.state import TrainState
from tests.official_directory import random_tree
from tests.small_model_directory import write_run

FLOW = FlowMatchingConfig(
    num_speech_tokens=27,
    speaker_dim=8,
    encoder=FlowEncoderConfig(width=16, num_heads=2, mlp_dim=16, num_layers=1, num_upsampled_layers=1),
    estimator=EstimatorConfig(width=16, num_blocks=1, num_mid_stages=2, num_heads=2, head_dim=8),
)
LM = TextSpeechLmConfig(
    backbone=Qwen2Config(vocabulary_size=300, width=16, mlp_dim=24, num_layers=2, num_heads=2, num_kv_heads=1),
    num_speech_tokens=27,
)


def scanned(config, scan):
    if isinstance(config, FlowMatchingConfig):
        return dataclasses.replace(config, scan_layers=scan)
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, scan_layers=scan))


def shapes(init, config):
    return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def fresh(init, config):
    """Zeros where a run would start, sharded."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    make = lambda key: TrainState(step=key, num_skipped=key, params=init(config, key), opt_state={}, model_state={})  # noqa: E731
    abstract, _ = abstract_state(make, mesh)
    return jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract.params)


def write(place, task, config, init, **facts):
    params = random_tree(shapes(init, config), np.random.default_rng(0))
    model = to_dict(config)
    write_run(place, task, {"model": model} | facts, (params, {}))
    about = {
        "config": to_dict(TrainConfig(name=task, task=task, model=config, num_steps=1)),
        "facts": {"model": model} | facts,
    }
    (place / "run.json").write_text(json.dumps(about))
    return params


@pytest.mark.parametrize(("theirs", "ours"), [(True, False), (False, True)])
def test_a_flow_starts_from_either_form(theirs, ours, tmp_path):
    params = write(tmp_path / "run", "flow_matching", scanned(FLOW, theirs), init_flow)
    empty = fresh(init_flow, scanned(FLOW, ours))
    loaded = load_initial_flow(str(tmp_path / "run"), scanned(FLOW, ours), empty)
    assert jax.tree.structure(loaded) == jax.tree.structure(empty)
    assert jax.tree.map(lambda a: a.sharding, loaded) == jax.tree.map(lambda a: a.sharding, empty)
    jax.tree.map(np.testing.assert_array_equal, match_layers(loaded, params), params)


@pytest.mark.parametrize(("theirs", "ours"), [(True, False), (False, True)])
def test_a_language_model_starts_from_either_form(theirs, ours, tmp_path):
    tokenizer = train_text_tokenizer(["one two"], 300, single_chinese=False)
    tokenizer.save(tmp_path / "tokenizer")
    params = write(tmp_path / "run", "text_speech_lm", scanned(LM, theirs), init_lm, text_tokenizer=tokenizer.hash)
    empty = fresh(init_lm, scanned(LM, ours))
    loaded = load_initial(str(tmp_path / "run"), scanned(LM, ours), empty, tmp_path / "tokenizer")
    assert jax.tree.structure(loaded) == jax.tree.structure(empty)
    jax.tree.map(np.testing.assert_array_equal, match_layers(loaded, params), nn.unbox(params))


def test_a_flow_does_not_start_from_another_stage(tmp_path):
    write_run(tmp_path / "run", "text_speech_lm", {"model": {}})
    with pytest.raises(UserError, match="is a run of text_speech_lm; give the --workdir of a flow_matching"):
        load_initial_flow(str(tmp_path / "run"), FLOW, {})


@pytest.mark.parametrize("theirs", [True, False])
def test_a_side_file_fits_its_base_in_either_form(theirs, tmp_path):
    base, lora = scanned(LM, theirs), LoraConfig(rank=2)
    params = write(tmp_path / "run", "text_speech_lm", base, init_lm)
    with_factors = jax.eval_shape(
        lambda key: add_lora(init_lm(scanned(LM, not theirs), key), lora, key), jax.random.key(0)
    )
    trained = jax.tree.map(jnp.asarray, random_tree(with_factors, np.random.default_rng(1)))
    trained |= jax.tree.map(jnp.asarray, match_layers(params, {name: trained[name] for name in params}))
    save_lora(tmp_path / "lora.safetensors", trained, lora)
    mesh, init = make_mesh(MeshConfig(), jax.devices()[:1]), lambda key: init_lm(base, key)
    loaded, _ = load_params(tmp_path / "run", init, mesh, lora_file=str(tmp_path / "lora.safetensors"))
    want = match_layers(effective_params(trained, lora), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded, want)
    other = jax.tree.map(lambda a: a + 1, trained)
    save_lora(tmp_path / "other.safetensors", other, lora)
    with pytest.raises(UserError, match=r"other\.safetensors does not fit: base: .* in the file"):
        load_params(tmp_path / "run", init, mesh, lora_file=str(tmp_path / "other.safetensors"))
