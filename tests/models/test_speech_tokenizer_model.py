"""The whole model: gradients, padding, quantizers, precision, sharding, and that it learns."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cv2jax.config import MeshConfig
from cv2jax.models.speech_tokenizer.loss import tokenizer_loss
from cv2jax.models.speech_tokenizer.model import encode, init_model_state, init_params
from cv2jax.nn.stack import stack_layers
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import RULES, abstract_state, axis_rules
from tests.models.small_tokenizer import SMALL, forward, make_batch, make_variables, small

QUANTIZERS = ("fsq", "vq", "none")


@functools.cache
def variables_of(config):
    return make_variables(config)


@functools.cache
def value_and_grad(config):
    """(params, batch, state, key) -> ((loss, (metrics, output)), gradients), compiled once a configuration."""

    def loss(params, batch, state, key):
        output = forward(config, params, batch, state, deterministic=False, key=key)
        value, metrics = tokenizer_loss(output, batch, config)
        return value, (metrics, output)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(config, batch=None, seed=0):
    params, state = variables_of(config)
    return value_and_grad(config)(params, make_batch() if batch is None else batch, state, jax.random.key(seed))


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_parameter_has_a_gradient(quantizer):
    (loss, (metrics, _)), grads = run(small(quantizer=quantizer))
    assert np.isfinite(loss)
    assert np.isfinite(metrics["row_loss"]).all()
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_differ_only_in_quantizer_and_up_projection(quantizer):
    config = small(quantizer=quantizer)
    params = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    want = nn.unbox(jax.eval_shape(lambda: init_params(SMALL, jax.random.key(0))))
    assert set(params) == {"encoder", "project_up", "encoder2", "decoder", "ctc_head", "pitch_head"} | (
        {"quantizer"} if quantizer == "fsq" else set()
    )
    for part in ("encoder", "encoder2", "decoder", "ctc_head"):
        assert jax.tree.map(jnp.shape, params[part]) == jax.tree.map(jnp.shape, want[part])
    assert params["project_up"]["kernel"].shape == (8 if quantizer == "fsq" else 16, 16)


def test_outputs_have_the_documented_shapes_and_dtypes():
    _, (_, out) = run(SMALL)[0]
    shapes = {name: (a.shape, str(a.dtype)) for name, a in vars(out).items() if name != "model_state"}
    assert shapes == {
        "hidden": ((4, 16, 16), "float32"),
        "z": ((4, 16, 8), "float32"),
        "speech_tokens": ((4, 16), "int32"),
        "num_speech_tokens": ((4,), "int32"),
        "decoder_logits": ((4, 7, 12), "float32"),
        "ctc_logits": ((4, 16, 12), "float32"),
        "pitch": ((4, 16), "float32"),
        "commitment": ((), "float32"),
    }
    assert out.model_state == {}
    assert float(out.pitch.min()) >= 0


def test_heads_without_weight_are_left_out():
    config = small(ctc_weight=0.0, pitch_weight=0.0)
    params = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert "ctc_head" not in params
    assert "pitch_head" not in params
    batch, (params, state) = make_batch(), variables_of(config)
    out = jax.eval_shape(functools.partial(forward, config), params, batch, state)
    assert out.ctc_logits is None
    assert out.pitch is None
    metrics = jax.eval_shape(lambda out: tokenizer_loss(out, batch, config), out)[1]
    assert "ctc_loss" not in metrics
    assert "pitch_loss" not in metrics


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_garbage_in_the_padding_changes_no_loss_and_no_state(quantizer):
    config, batch = small(quantizer=quantizer), make_batch()
    frames = jnp.arange(64) < batch["num_frames"][:, None, None]
    text = jnp.arange(6) < batch["num_text_tokens"][:, None]
    dirty = batch | {
        "mel": jnp.where(frames, batch["mel"], 1e4).at[3].set(-7.0),
        "text_tokens": jnp.where(text, batch["text_tokens"], 11),
    }
    (loss, (_, out)), grads = run(config, batch)
    (dirty_loss, (_, dirty_out)), dirty_grads = run(config, dirty)
    assert float(loss) == pytest.approx(float(dirty_loss), rel=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, grads, dirty_grads)
    jax.tree.map(close, out.model_state, dirty_out.model_state)


def test_gradient_reaches_the_encoder_through_the_rounding():
    _, grads = run(SMALL)
    assert float(jnp.abs(grads["encoder"]["conv1"]["kernel"]).max()) > 1e-6


def test_vq_state_moves_in_training_only():
    config = small(quantizer="vq")
    params, _ = variables_of(config)
    (_, (_, out)), _ = run(config)
    # Rows 0-2 count (the last one only fills the batch): 16 + 13 + 10 positions, undecayed at the first update.
    assert float(out.model_state.counts.sum()) == pytest.approx(39.0)
    batch = make_batch()
    still = jax.jit(functools.partial(forward, config))(params, batch, out.model_state)
    jax.tree.map(np.testing.assert_array_equal, still.model_state, out.model_state)
    tokens, _ = jax.jit(encode, static_argnums=0)(config, params, batch["mel"], batch["num_frames"], out.model_state)
    np.testing.assert_array_equal(tokens, still.speech_tokens)
    assert int(tokens.max()) < config.codebook_size


def test_dropout_follows_its_key():
    config = small(dropout=0.3)
    params, state = variables_of(config)
    step = jax.jit(functools.partial(forward, config, deterministic=False))
    first, again, other = (step(params, make_batch(), state, key=jax.random.key(seed)).hidden for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_scan_and_remat_equal_the_unrolled_model():
    params, state = variables_of(SMALL)
    (want, _), want_grads = run(SMALL)
    config = small(scan_layers=True, remat="full")

    def stacked(tree):
        encoder = tree["encoder"] | {"stack": stack_layers(tree["encoder"]["stack"])}
        rest = {part: stack_layers(tree[part]) for part in ("encoder2", "decoder")}
        return tree | {"encoder": encoder} | rest

    (got, _), grads = value_and_grad(config)(stacked(params), make_batch(), state, jax.random.key(0))
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, stacked(want_grads))


@pytest.mark.slow
def test_bfloat16_computes_finitely_with_float32_parameters_and_logits():
    config = small(dtype="bfloat16")
    (loss, (_, out)), grads = run(config)
    assert np.isfinite(loss)
    assert out.hidden.dtype == jnp.bfloat16
    assert {str(a.dtype) for a in (out.z, out.decoder_logits, out.ctc_logits, loss)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((variables_of(config)[0], grads))} == {"float32"}
    (want, _), _ = run(SMALL)
    assert float(loss) == pytest.approx(float(want), rel=0.05)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_all_logical_axes_have_a_rule(quantizer, scan):
    config, known = small(quantizer=quantizer, scan_layers=scan), {name for name, _ in RULES}

    def init(key):
        return init_params(config, key), init_model_state(config, key)

    boxed = jax.eval_shape(init, jax.random.key(0))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(box, nn.Partitioned) for box in boxes)
    for box in boxes:
        assert len(box.names) == box.value.ndim
        assert {name for name in box.names if name} <= known


def test_large_parameters_are_split_by_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    _, shardings = abstract_state(lambda key: init_params(SMALL, key), mesh)
    block = shardings["encoder2"]["blocks_0"]
    assert block["attention"]["query"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert block["attention"]["out"]["kernel"].spec == PartitionSpec("tensor", None, "fsdp")
    assert block["attention"]["fsmn"]["kernel"].spec == PartitionSpec(None, "tensor")
    assert block["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["decoder"]["embedding"]["table"].spec == PartitionSpec("tensor", "fsdp")
    assert block["mlp_norm"]["scale"].spec == PartitionSpec()


@pytest.mark.parametrize("quantizer", ["fsq"])
def test_a_mesh_of_fsdp_and_tensor_gives_the_same_loss_and_gradients(quantizer):
    config = small(quantizer=quantizer)
    params, state = variables_of(config)
    (want, (_, want_out)), want_grads = run(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])

    def init(key):
        return init_params(config, key), init_model_state(config, key)

    _, shardings = abstract_state(init, mesh)
    placed = jax.device_put((params, state), shardings)
    batch = jax.device_put(make_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh), axis_rules():
        step = jax.jit(lambda *a: value_and_grad.__wrapped__(config)(*a))
        (got, (_, out)), grads = step(placed[0], batch, placed[1], key)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, grads, want_grads)
    jax.tree.map(close, out.model_state, want_out.model_state)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_overfits_one_batch(quantizer):
    config, batch, start = small(quantizer=quantizer), make_batch(), time.monotonic()
    params, state = variables_of(config)
    optimizer = optax.adam(1e-2)
    update, opt_state = jax.jit(optimizer.update), optimizer.init(params)
    apply_updates, accuracies = jax.jit(optax.apply_updates), []
    for step in range(200):
        (_, (metrics, out)), grads = value_and_grad(config)(params, batch, state, jax.random.key(step))
        updates, opt_state = update(grads, opt_state)
        params, state = apply_updates(params, updates), out.model_state
        accuracies.append(float(metrics["decoder_accuracy"]))
        if accuracies[-1] == 1.0:
            break
    assert accuracies[0] < 0.5
    assert accuracies[-1] == 1.0
    assert time.monotonic() - start < 60
