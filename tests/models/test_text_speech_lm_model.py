"""The language model against the official one at tiny size: embeddings, logits, loss, cached decoding, packing, sharding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.models.text_speech_lm import model as lm
from cv2jax.models.text_speech_lm.loss import next_token_loss
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config, config_from_hf, init_cache
from cv2jax.models.text_speech_lm.sequence import IGNORE
from cv2jax.nn.masks import causal_mask, key_mask, length_mask
from cv2jax.nn.stack import stack_layers
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from tests.models.golden_lm import GOLDENS, golden_config, golden_params

CONFIG = golden_config()


@pytest.fixture(scope="module")
def params():
    unrolled = golden_params(CONFIG)
    return unrolled | {"backbone": stack_layers(unrolled["backbone"])}


def unistream(text, speech):
    """Tokens and kinds of [sos] text [task] speech, spec/official.md 3.3."""
    tokens = [0, *text, 1, *speech]
    kinds = [lm.SPECIAL, *[lm.TEXT] * len(text), lm.SPECIAL, *[lm.SPEECH] * len(speech)]
    return np.array(tokens), np.array(kinds)


def golden_batch():
    golden = np.load(GOLDENS / "llm_uni_tiny.npz")
    size = golden["lm_target"].shape[1]
    tokens, kinds = np.zeros((2, 3, size), np.int32)
    for row in range(3):
        text = golden["text_token"][row, : golden["text_token_len"][row]]
        t, k = unistream(text, golden["speech_token"][row, : golden["speech_token_len"][row]])
        tokens[row, : len(t)], kinds[row, : len(k)] = t, k
    return golden, jnp.asarray(tokens), jnp.asarray(kinds), jnp.asarray(golden["lm_input_len"])


def apply(params, tokens, kinds, lengths, config=CONFIG, **options):
    size = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    mask = causal_mask(size, size) & key_mask(length_mask(lengths, size))
    return lm.TextSpeechLm(config, **options).apply({"params": params}, tokens, kinds, positions, mask)


def loss_of(logits, targets):
    return next_token_loss(logits, jnp.asarray(targets, jnp.int32), num_speech_tokens=CONFIG.num_speech_tokens)


def test_embeddings_logits_loss_and_accuracy_are_the_official_ones(params):
    golden, tokens, kinds, lengths = golden_batch()
    keep = np.asarray(length_mask(lengths, tokens.shape[1]))
    x = lm.TextSpeechLm(CONFIG).apply({"params": params}, tokens, kinds, method="embed")
    np.testing.assert_allclose(np.asarray(x)[keep], golden["lm_input"][keep], atol=1e-6)
    out = apply(params, tokens, kinds, lengths)
    np.testing.assert_allclose(np.asarray(out.logits)[keep], golden["logits"][keep], atol=1e-4)
    loss, metrics = loss_of(out.logits, golden["lm_target"])
    assert float(loss) == pytest.approx(float(golden["loss"]), abs=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx(float(golden["acc"]), abs=1e-6)
    assert int(metrics["num_targets"]) == (golden["lm_target"] != IGNORE).sum()


def test_decoding_with_a_cache_gives_the_official_probabilities(params):
    golden = np.load(GOLDENS / "llm_step_tiny.npz")
    text = np.concatenate([golden["prompt_text"][0], golden["text"][0]])
    tokens, kinds = unistream(text, golden["prompt_speech_token"][0])
    forced, first = golden["forced"], len(tokens)
    model, length = lm.TextSpeechLm(CONFIG), first + len(forced)
    cache, got = init_cache(CONFIG.backbone, 1, length), []

    @jax.jit
    def step(tokens, kinds, start, cache):
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        mask = causal_mask(tokens.shape[1], length, start[0])
        out = model.apply({"params": params}, tokens, kinds, positions, mask, cache=cache, start=start)
        return jax.nn.log_softmax(out.logits[:, -1]), out.cache

    at = jnp.zeros((1,), jnp.int32)
    log_probs, cache = step(jnp.asarray(tokens)[None], jnp.asarray(kinds)[None], at, cache)
    got.append(log_probs[0])
    for i, token in enumerate(forced.tolist()):
        one = jnp.full((1, 1), token, jnp.int32)
        log_probs, cache = step(one, jnp.full_like(one, lm.SPEECH), at + first + i, cache)
        got.append(log_probs[0])
    np.testing.assert_allclose(np.stack(got), golden["logp"], atol=1e-4)


def test_rows_of_a_cache_stand_at_their_own_places(params):
    _, tokens, kinds, lengths = golden_batch()
    whole = apply(params, tokens, kinds, lengths).logits
    model, size = lm.TextSpeechLm(CONFIG), tokens.shape[1]
    start = jnp.array([9, 21, 4])
    # Each row first takes its own prefix (what lies behind it is overwritten later), then three more tokens at once.
    positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    filled = model.apply(
        {"params": params},
        tokens,
        kinds,
        positions,
        causal_mask(size, size),
        cache=init_cache(CONFIG.backbone, 3, size),
        start=jnp.zeros((3,), jnp.int32),
    ).cache
    index = start[:, None] + jnp.arange(3)
    poisoned = jax.tree.map(
        lambda a: jnp.where((jnp.arange(size) < start[:, None])[None, :, :, None, None], a, 1e3), filled
    )
    mask = (jnp.arange(size) <= index[..., None])[:, None]
    pick = lambda a: jnp.take_along_axis(a, index, axis=1)  # noqa: E731
    got = model.apply({"params": params}, pick(tokens), pick(kinds), index, mask, cache=poisoned, start=start).logits
    want = jnp.take_along_axis(whole, index[..., None], axis=1)
    np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="`start`"):
        model.apply({"params": params}, tokens, kinds, positions, causal_mask(size, size), cache=filled)


def test_packed_segments_equal_rows_of_their_own(params):
    golden, tokens, kinds, lengths = golden_batch()
    alone = apply(params, tokens, kinds, lengths).logits
    spans = [(row, int(n)) for row, n in enumerate(lengths)]
    join = lambda a: jnp.concatenate([a[row, :n] for row, n in spans])[None]  # noqa: E731
    segments = jnp.concatenate([jnp.full((n,), row) for row, n in spans])
    positions = jnp.concatenate([jnp.arange(n) for _, n in spans])[None]
    same = (segments[:, None] == segments[None, :])[None, None]
    packed = lm.TextSpeechLm(CONFIG).apply(
        {"params": params}, join(tokens), join(kinds), positions, same & causal_mask(len(segments), len(segments))
    )
    np.testing.assert_allclose(packed.logits, join(alone), atol=1e-5)
    loss, _ = loss_of(packed.logits, join(golden["lm_target"]))
    assert float(loss) == pytest.approx(float(golden["loss"]), abs=1e-5)


def test_scan_remat_and_unrolled_layers_agree(params):
    _, tokens, kinds, lengths = golden_batch()
    unrolled = golden_params(CONFIG)

    def gradient(config, params):
        return jax.jit(jax.grad(lambda p: apply(p, tokens, kinds, lengths, config).logits.std()))(params)

    scanned = gradient(CONFIG, params)
    for change in ({"remat": "full"}, {"remat": "dots"}):
        config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, **change))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(config, params), scanned)
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, scan_layers=False))
    got = gradient(config, unrolled)
    got = got | {"backbone": stack_layers(got["backbone"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, scanned)


def test_a_mesh_gives_the_same_logits(params):
    _, tokens, kinds, lengths = golden_batch()
    tokens, kinds, lengths = (jnp.concatenate([a, a[:1]]) for a in (tokens, kinds, lengths))
    want = apply(params, tokens, kinds, lengths).logits
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    _, shardings = abstract_state(lambda key: lm.init_params(CONFIG, key), mesh)
    assert shardings["backbone"]["blocks"]["attention"]["query"]["kernel"].spec == jax.P(None, "fsdp", "tensor")
    placed = jax.tree.map(jax.device_put, params, shardings)
    with jax.set_mesh(mesh), axis_rules():
        got = jax.jit(lambda p: apply(p, tokens, kinds, lengths).logits)(placed)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_computes_with_float32_parameters_and_logits(params):
    _, tokens, kinds, lengths = golden_batch()
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, dtype="bfloat16"))
    out = apply(params, tokens, kinds, lengths, config)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    np.testing.assert_allclose(out.logits, apply(params, tokens, kinds, lengths).logits, atol=0.1)


def test_parameters_start_as_upstream_and_number_what_the_official_model_has():
    small = dataclasses.replace(CONFIG, num_speech_tokens=5000)
    params = nn.unbox(jax.jit(lambda: lm.init_params(small, jax.random.key(0)))())
    assert float(params["speech_embedding"].std()) == pytest.approx(1.0, abs=0.01)
    bound = small.backbone.width**-0.5
    assert float(jnp.abs(params["head_kernel"]).max()) <= bound
    assert float(params["head_kernel"].std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    official = lm.TextSpeechLmConfig()
    shapes = nn.unbox(jax.eval_shape(lambda: lm.init_params(official, jax.random.key(0))))
    backbone = 494_032_768  # Qwen2.5-0.5B, its tied text embedding included (spec/official.md 8.1)
    speech = 2 * 896 + 6564 * 896 + 896 * 6564 + 6564
    assert sum(a.size for a in jax.tree.leaves(shapes)) == backbone + speech


HF = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_config_json_of_both_transformers_generations():
    want = Qwen2Config(
        vocabulary_size=100, width=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, rope_theta=5e5
    )
    assert config_from_hf(HF | {"rope_theta": 5e5}, "c.json") == want
    assert config_from_hf(HF | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "c.json") == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"c\.json: model_type is 'llama'; only 'qwen2'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "scaled rotary positions"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is on"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"num_attention_heads": 5}, "width=32: must be a multiple of num_heads=5"),
        ({"num_attention_heads": 32, "num_key_value_heads": 2}, "must be even"),
        ({"rms_norm_eps": 0.0}, "norm_epsilon=0.0: must be positive"),
    ],
)
def test_other_models_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(HF | changes, "c.json")


def test_a_config_json_that_lacks_a_size_is_named():
    with pytest.raises(UserError, match=r"c\.json: lacks hidden_size"):
        config_from_hf({k: v for k, v in HF.items() if k != "hidden_size"}, "c.json")
    with pytest.raises(UserError, match="num_speech_tokens=0"):
        lm.TextSpeechLmConfig(num_speech_tokens=0).validate()
