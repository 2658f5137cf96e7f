"""Encoder1 and FSQ against the official module's numbers; padding changes nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer.config import tiny
from cv2jax.models.speech_tokenizer.encoder import FsmnAttention
from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS, SpeechTokenizer, encode, init_params
from cv2jax.nn.rope import rope_angles
from cv2jax.nn.stack import stack_layers
from tests.models.golden_weights import load_golden

CONFIG = tiny()


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def run(golden):
    """mel, lengths -> SpeechEncoding, compiled once a shape."""
    params, _ = golden
    apply = jax.jit(lambda mel, n: SpeechTokenizer(CONFIG).apply({"params": params}, mel, n, {}, method="encode"))
    return lambda mel, n: apply(jnp.asarray(mel), jnp.asarray(n, jnp.int32))


@pytest.fixture(scope="module")
def encoding(golden, run):
    _, arrays = golden
    return run(arrays["mel"], arrays["mel_len"])


def rows(arrays):
    return list(enumerate(arrays["token_len"]))


def test_conversion_fills_exactly_the_encoding_parts(golden):
    params, _ = golden
    ours = nn.unbox(jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0))))
    want = {part: ours[part] for part in ENCODING_PARTS}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)


def test_hidden_equals_the_official_encoder(golden, encoding):
    _, arrays = golden
    for row, length in rows(arrays):
        got, want = encoding.hidden[row, :length], arrays["hidden"][row, :length]
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_projection_equals_the_official_one(golden, encoding):
    _, arrays = golden
    assert encoding.z.dtype == jnp.float32
    for row, length in rows(arrays):
        np.testing.assert_allclose(encoding.z[row, :length], arrays["z"][row, :length], atol=1e-4, rtol=0)


def test_tokens_equal_the_official_ids_exactly(golden, encoding):
    _, arrays = golden
    np.testing.assert_array_equal(encoding.num_speech_tokens, arrays["token_len"])
    assert encoding.speech_tokens.dtype == jnp.int32
    for row, length in rows(arrays):
        np.testing.assert_array_equal(encoding.speech_tokens[row, :length], arrays["tokens"][row, :length])
        assert not np.any(encoding.speech_tokens[row, length:])


def test_encode_needs_only_the_front_half_and_scanned_layers_agree(golden, encoding):
    params, arrays = golden
    scanned = params | {"encoder": params["encoder"] | {"stack": stack_layers(params["encoder"]["stack"])}}
    config = dataclasses.replace(CONFIG, scan_layers=True)
    tokens, number = encode(config, scanned, jnp.asarray(arrays["mel"]), jnp.asarray(arrays["mel_len"], jnp.int32))
    np.testing.assert_array_equal(tokens, encoding.speech_tokens)
    np.testing.assert_array_equal(number, arrays["token_len"])


@pytest.mark.parametrize("garbage", [100.0, np.nan])
def test_garbage_in_the_padding_changes_nothing(golden, run, encoding, garbage):
    _, arrays = golden
    mel = arrays["mel"].copy()
    for row, length in enumerate(arrays["mel_len"]):
        mel[row, :, length:] = garbage
    dirty = run(mel, arrays["mel_len"])
    np.testing.assert_array_equal(dirty.speech_tokens, encoding.speech_tokens)
    for row, length in rows(arrays):
        np.testing.assert_array_equal(dirty.hidden[row, :length], encoding.hidden[row, :length])
    assert bool(jnp.isfinite(dirty.hidden).all())


def test_longer_padding_changes_nothing(golden, run, encoding):
    _, arrays = golden
    longer = run(np.pad(arrays["mel"], ((0, 0), (0, 0), (0, 56))), arrays["mel_len"])
    np.testing.assert_array_equal(longer.speech_tokens[:, :50], encoding.speech_tokens)
    for row, length in rows(arrays):
        np.testing.assert_allclose(longer.hidden[row, :length], encoding.hidden[row, :length], atol=1e-5)


def test_batch_mates_change_nothing(golden, run, encoding):
    _, arrays = golden
    reverse = run(arrays["mel"][::-1], arrays["mel_len"][::-1])
    np.testing.assert_array_equal(reverse.speech_tokens[::-1], encoding.speech_tokens)
    alone = run(arrays["mel"][1:2, :, : arrays["mel_len"][1]], arrays["mel_len"][1:2])
    np.testing.assert_array_equal(alone.speech_tokens[0], arrays["tokens"][1, : arrays["token_len"][1]])


def test_a_row_of_no_frames_is_harmless(run, golden):
    _, arrays = golden
    out = run(arrays["mel"], np.array([200, 0, 1, 5]))
    np.testing.assert_array_equal(out.num_speech_tokens, [50, 0, 1, 2])
    np.testing.assert_array_equal(out.speech_tokens[0], arrays["tokens"][0])
    assert bool(jnp.isfinite(out.hidden).all())


@pytest.mark.parametrize("num_frames", range(1, 14))
def test_token_count_is_a_quarter_rounded_up(num_frames):
    config = dataclasses.replace(CONFIG, width=8, num_mels=4)
    model = SpeechTokenizer(config)
    key, mel, n = jax.random.key(0), jnp.zeros((1, 4, num_frames)), jnp.array([num_frames])
    out = jax.eval_shape(lambda: model.init_with_output(key, mel, n, {}, method="encode")[0])
    assert out.speech_tokens.shape == (1, -(-num_frames // 4))


def test_positions_have_no_limit_of_2048():
    """80 s and more: the official table ends at 2,048 positions, ours is computed."""
    config = dataclasses.replace(CONFIG, width=8, num_heads=2, num_layers=1, num_mels=4)
    mel = jax.random.normal(jax.random.key(0), (1, 4, 4 * 2100))
    run = jax.jit(
        lambda key: SpeechTokenizer(config).init_with_output(key, mel, jnp.array([8400]), {}, method="encode")
    )
    tokens, _ = run(jax.random.key(1))
    assert tokens.num_speech_tokens[0] == 2100
    assert bool(jnp.isfinite(tokens.hidden).all())
    assert len(np.unique(tokens.speech_tokens[0, 2048:])) > 1


def test_attention_equals_plain_numpy():
    """One FSMN attention layer written out: rotary heads, masked keys, memory after the output projection."""
    rng, dim, heads, length = np.random.default_rng(0), 8, 2, 6
    x, mask = jnp.asarray(rng.normal(size=(1, length, dim)), jnp.float32), np.array([[True] * 4 + [False] * 2])
    layer, angles = FsmnAttention(dim, heads, 3), rope_angles(jnp.arange(length), dim // heads, 1e4)
    params = nn.unbox(layer.init(jax.random.key(0), x, jnp.asarray(mask), angles))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    w = jax.tree.map(np.asarray, params["params"])
    q, k, v = (np.einsum("bld,dhc->blhc", x, w[n]["kernel"]) for n in ("query", "key", "value"))
    q, v = q + w["query"]["bias"], v + w["value"]["bias"]

    def rotate(a):
        f = np.concatenate([angles, angles], -1)[None, :, None]
        return a * np.cos(f) + np.concatenate([-a[..., 2:], a[..., :2]], -1) * np.sin(f)

    logits = np.einsum("bthc,bshc->bhts", rotate(q), rotate(k)) / np.sqrt(dim // heads)
    weights = np.where(mask[:, None, None], np.exp(logits - logits.max()), 0)
    attended = np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v)
    v = v * mask[:, :, None, None]
    padded = np.pad(v, ((0, 0), (1, 1), (0, 0), (0, 0)))
    memory = v + sum(padded[:, i : i + length] * w["fsmn"]["kernel"][i] for i in range(3))
    want = np.einsum("bthc,hcd->btd", attended, w["out"]["kernel"]) + w["out"]["bias"]
    want = want + (memory * mask[:, :, None, None]).reshape(1, length, dim)
    np.testing.assert_allclose(layer.apply(params, x, jnp.asarray(mask), angles), want, atol=1e-4, rtol=1e-5)
