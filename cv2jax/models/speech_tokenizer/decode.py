"""Greedy transcription by both heads; the attention decoder's is a bounded loop over plain-pytree caches."""

import typing
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.models.speech_tokenizer.asr import EOS_ID, PAD_ID, SOS_ID, ctc_greedy
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import SpeechTokenizer


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class Transcription:
    """What a recogniser heard, greedily; positions past the counts are 0."""

    text_tokens: Int[Array, "B T"]  # of the attention decoder, without sos and eos
    num_text_tokens: Int[Array, " B"]
    ctc_tokens: Int[Array, "B L"] | None  # of the CTC head's best path; None without the head
    num_ctc_tokens: Int[Array, " B"] | None
    speech_tokens: Int[Array, "B L"]
    num_speech_tokens: Int[Array, " B"]


def transcribe(
    config: SpeechTokenizerConfig,
    params: PyTree,
    mel: Float[Array, "B M F"],
    num_frames: Int[Array, " B"],
    max_text_tokens: int,
    model_state: PyTree = None,
) -> Transcription:
    """Speech tokens and both heads' transcripts from one pass of the encoders; see `decode_memory` for max_text_tokens."""
    model, state = SpeechTokenizer(config), {} if model_state is None else model_state
    encoding, memory, mask = cast(Any, model.apply({"params": params}, mel, num_frames, state, method="understand"))
    text, num_text = decode_memory(config, params, memory, mask, max_text_tokens)
    ctc, num_ctc = None, None
    if config.ctc_weight > 0:
        logits = cast(Array, model.apply({"params": params}, memory, method="ctc"))
        ctc, num_ctc = ctc_greedy(logits, encoding.num_speech_tokens)
    return Transcription(
        text_tokens=text,
        num_text_tokens=num_text,
        ctc_tokens=ctc,
        num_ctc_tokens=num_ctc,
        speech_tokens=encoding.speech_tokens,
        num_speech_tokens=encoding.num_speech_tokens,
    )


def transcribe_tokens(
    config: SpeechTokenizerConfig,
    params: PyTree,
    speech_tokens: Int[Array, "B L"],
    num_speech_tokens: Int[Array, " B"],
    max_text_tokens: int,
    model_state: PyTree = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """What the attention decoder hears in speech tokens, whoever made them; arguments and result as `decode_memory`."""
    model, state = SpeechTokenizer(config), {} if model_state is None else model_state
    inputs = (speech_tokens, num_speech_tokens, state)
    memory, mask = cast(Any, model.apply({"params": params}, *inputs, method="understand_tokens"))
    return decode_memory(config, params, memory, mask, max_text_tokens)


def decode_memory(
    config: SpeechTokenizerConfig,
    params: PyTree,
    memory: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    max_text_tokens: int,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Transcribes Encoder2's output by always taking the likeliest token; equals the argmax of a teacher-forced forward.

    Stops when every row has said eos, after `max_text_tokens` at the latest (at most config.max_text_tokens, ValueError).
    Jittable with `config` and `max_text_tokens` static.

    Returns: (tokens [B, max_text_tokens] without sos and eos, padded with 0; their numbers [B]).
    """
    if not 0 < max_text_tokens <= config.max_text_tokens:
        raise ValueError(f"max_text_tokens={max_text_tokens} must lie in 1..{config.max_text_tokens}")
    model, variables = SpeechTokenizer(config), {"params": params}
    num_rows = memory.shape[0]

    def step(tokens: Int[Array, " B"], cache: PyTree, position: Int[Array, ""]) -> tuple[Int[Array, " B"], PyTree]:
        logits, cache = model.apply(variables, tokens[:, None], memory, mask, cache, position, method="decode_step")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def body(carry: tuple) -> tuple:
        position, last, done, tokens, num_tokens, cache = carry
        tokens = tokens.at[:, position].set(jnp.where(done, PAD_ID, last))
        following, cache = step(last, cache, position + 1)
        return position + 1, following, done | (following == EOS_ID), tokens, num_tokens + ~done, cache

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        return (carry[0] < max_text_tokens) & ~jnp.all(carry[2])

    # The first step is outside the loop: it also fills the cross-attention caches, which changes the cache's structure.
    cache = model.apply(variables, num_rows, method="init_cache")
    first, cache = step(jnp.full((num_rows,), SOS_ID, jnp.int32), cache, jnp.int32(0))
    tokens = jnp.full((num_rows, max_text_tokens), PAD_ID, jnp.int32)
    carry = (jnp.int32(0), first, first == EOS_ID, tokens, jnp.zeros((num_rows,), jnp.int32), cache)
    _, _, _, tokens, num_tokens, _ = jax.lax.while_loop(unfinished, body, carry)
    return tokens, num_tokens
