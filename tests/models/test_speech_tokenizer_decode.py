"""Greedy decoding equals the argmax of a teacher-forced forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer.asr import EOS_ID, ctc_greedy
from cv2jax.models.speech_tokenizer.decode import transcribe, transcribe_tokens
from tests.models.small_tokenizer import SMALL, forward, make_batch, make_variables, small


@pytest.fixture(scope="module")
def batch():
    return make_batch(num_rows=6)


def make_heedful_variables(config):
    """Parameters whose decoder heeds position and speech and says eos now and then: rows end at different lengths."""
    params, state = make_variables(config, seed=2)
    decoder = params["decoder"]
    decoder["positions"] = decoder["positions"] * 20
    decoder["blocks_0"]["cross_out"]["kernel"] = decoder["blocks_0"]["cross_out"]["kernel"] * 4
    eos = decoder["embedding"]["table"][EOS_ID]
    decoder["final_norm"]["bias"] = decoder["final_norm"]["bias"] + 0.3 * eos / jnp.linalg.norm(eos)
    return params, state


@pytest.fixture(scope="module")
def variables():
    return make_heedful_variables(SMALL)


def decode(config, params, batch, size):
    heard = jax.jit(transcribe, static_argnums=(0, 4))(config, params, batch["mel"], batch["num_frames"], size)
    return heard.text_tokens, heard.num_text_tokens


@pytest.fixture(scope="module")
def decoded(variables, batch):
    return decode(SMALL, variables[0], batch, SMALL.max_text_tokens)


def test_equals_teacher_forcing(variables, batch, decoded):
    tokens, num_tokens = decoded
    params, state = variables
    fed = batch | {"text_tokens": tokens, "num_text_tokens": num_tokens}
    best = np.asarray(jnp.argmax(forward(SMALL, params, fed, state).decoder_logits, axis=-1))
    for row, length in enumerate(np.asarray(num_tokens)):
        np.testing.assert_array_equal(tokens[row, :length], best[row, :length])
        if length < SMALL.max_text_tokens:
            assert best[row, length] == EOS_ID
        assert EOS_ID not in np.asarray(tokens[row])
        assert not np.any(tokens[row, length:])


def test_rows_of_the_fixture_end_at_different_lengths(decoded):
    assert len(np.unique(decoded[1])) > 1


def test_a_bound_cuts_the_same_tokens(variables, batch, decoded):
    tokens, num_tokens = decode(SMALL, variables[0], batch, 3)
    np.testing.assert_array_equal(tokens, decoded[0][:, :3])
    np.testing.assert_array_equal(num_tokens, np.minimum(decoded[1], 3))


def test_batch_mates_and_padding_do_not_matter(variables, batch, decoded):
    longer = jnp.pad(batch["mel"], ((0, 0), (0, 0), (0, 24)), constant_values=9.0)
    tokens, num_tokens = decode(SMALL, variables[0], batch | {"mel": longer}, SMALL.max_text_tokens)
    np.testing.assert_array_equal(tokens, decoded[0])
    np.testing.assert_array_equal(num_tokens, decoded[1])


@pytest.mark.slow
def test_scanned_layers_decode_with_stacked_caches(batch):
    config = small(scan_layers=True, remat="full")
    params, state = make_variables(config)
    tokens, num_tokens = decode(config, params, batch, 4)
    fed = batch | {"text_tokens": tokens, "num_text_tokens": num_tokens}
    best = np.asarray(jnp.argmax(forward(config, params, fed, state).decoder_logits, axis=-1))
    for row, length in enumerate(np.asarray(num_tokens)):
        np.testing.assert_array_equal(tokens[row, :length], best[row, :length])


@pytest.mark.parametrize("size", [0, 8])
def test_bad_bound(variables, batch, size):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.7"):
        transcribe(SMALL, variables[0], batch["mel"], batch["num_frames"], size)


def test_ctc_and_speech_tokens_equal_the_forwards(variables, batch):
    params, state = variables
    out = forward(SMALL, params, batch, state)
    want = ctc_greedy(out.ctc_logits, out.num_speech_tokens)
    heard = jax.jit(transcribe, static_argnums=(0, 4))(SMALL, params, batch["mel"], batch["num_frames"], 2)
    jax.tree.map(np.testing.assert_array_equal, (heard.ctc_tokens, heard.num_ctc_tokens), want)
    np.testing.assert_array_equal(heard.speech_tokens, out.speech_tokens)
    np.testing.assert_array_equal(heard.num_speech_tokens, out.num_speech_tokens)


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_tokens_read_back_are_what_was_heard(batch, quantizer):
    config = small(quantizer=quantizer)
    params, state = make_heedful_variables(config)
    size, codebook = config.max_text_tokens, (state,) if quantizer == "vq" else ()
    hear, read = (jax.jit(f, static_argnums=(0, 4)) for f in (transcribe, transcribe_tokens))
    heard = hear(config, params, batch["mel"], batch["num_frames"], size, *codebook)
    tokens, num_tokens = read(config, params, heard.speech_tokens, heard.num_speech_tokens, size, *codebook)
    np.testing.assert_array_equal(tokens, heard.text_tokens)
    np.testing.assert_array_equal(num_tokens, heard.num_text_tokens)
    # Nobody looks behind a row's end; what lies before it decides.
    within = jnp.arange(heard.speech_tokens.shape[1]) < heard.num_speech_tokens[:, None]
    for where in (~within, within):
        changed = jnp.where(where, (heard.speech_tokens + 5) % config.num_codes, heard.speech_tokens)
        again, _ = read(config, params, changed, heard.num_speech_tokens, size, *codebook)
        assert bool(jnp.all(again == tokens)) is (where is not within)


def test_without_a_quantizer_there_are_no_tokens_to_read(batch):
    config = small(quantizer="none", pitch_weight=0.0)
    params, state = make_variables(config)
    with pytest.raises(ValueError, match="no tokens to understand"):
        transcribe_tokens(config, params, jnp.zeros((2, 9), jnp.int32), jnp.array([9, 4]), 3, state)
