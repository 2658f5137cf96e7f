"""The training loss of the speech tokenizer and its metrics (paper 2.2; spec/frontends.md 1.8 and 1.9)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.models.speech_tokenizer.asr import ctc_feasible, ctc_loss, smoothed_cross_entropy, teacher_forcing
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.fsq import digit_balance_loss
from cv2jax.models.speech_tokenizer.model import PITCH_UNIT_HZ, SpeechTokenizerOutput
from cv2jax.nn.masks import length_mask


def tokenizer_loss(
    output: SpeechTokenizerOutput, batch: Mapping[str, Array], config: SpeechTokenizerConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy and, each by its weight in the config: CTC, L1 of F0, balance of the digits (fsq), commitment (vq); fp32.

    Text losses are sums over the batch divided by the number of tokens that count, so that every token weighs the same.
    Rows with row_mask False or without text weigh nothing; rows too short for their text weigh nothing in the CTC.

    Args:
      output: of `SpeechTokenizer`. config: its configuration.
      batch: `text_tokens` [B, T], `num_text_tokens` [B], optional `row_mask` [B] bool (False: filler), and with a pitch
        loss `f0` [B, L] in Hz at 25 Hz (0 where unvoiced) and optional `f0_mask` [B, L] bool.

    Returns: (loss, metrics): scalars `loss decoder_loss decoder_accuracy ctc_loss pitch_loss balance_loss
      commitment_loss num_text_tokens`, as far as the model has the part, and `row_loss` [B], each row's own summed
      loss, by which a non-finite step is traced to its utterances.
    """
    num_text = batch["num_text_tokens"]
    rows = batch["row_mask"] if "row_mask" in batch else jnp.ones(num_text.shape, bool)
    loss, row_loss, metrics = _decoder_loss(output, batch, rows, config.label_smoothing)
    if output.ctc_logits is not None:
        arguments = (output.num_speech_tokens, batch["text_tokens"], num_text)
        per_row = _masked(rows, ctc_loss(output.ctc_logits, *arguments))
        tokens = jnp.sum(_masked(rows & ctc_feasible(*arguments), num_text))
        metrics["ctc_loss"] = jnp.sum(per_row) / jnp.maximum(tokens, 1)
        loss, row_loss = loss + config.ctc_weight * metrics["ctc_loss"], row_loss + config.ctc_weight * per_row
    if output.pitch is not None:
        per_row, num_frames = _pitch_loss(output.pitch, output.num_speech_tokens, batch, rows)
        metrics["pitch_loss"] = jnp.sum(per_row) / jnp.maximum(num_frames, 1)
        loss, row_loss = loss + config.pitch_weight * metrics["pitch_loss"], row_loss + config.pitch_weight * per_row
    if output.z is not None and config.balance_weight > 0:
        mask = length_mask(output.num_speech_tokens, output.z.shape[1]) & rows[:, None]
        metrics["balance_loss"] = digit_balance_loss(output.z, mask)
        loss = loss + config.balance_weight * metrics["balance_loss"]
    if config.quantizer == "vq":
        metrics["commitment_loss"] = output.commitment
        loss = loss + config.commitment_weight * output.commitment
    return loss, metrics | {"loss": loss, "row_loss": row_loss}


def _masked(mask: Bool[Array, "..."], values: Array) -> Array:
    """Zero where the mask is False, also when the value there is not finite."""
    return jnp.where(mask, values, 0)


def _decoder_loss(
    output: SpeechTokenizerOutput, batch: Mapping[str, Array], rows: Bool[Array, " B"], smoothing: float
) -> tuple[Float[Array, ""], Float[Array, " B"], dict[str, Array]]:
    _, targets, mask = teacher_forcing(batch["text_tokens"], batch["num_text_tokens"])
    mask = mask & rows[:, None]
    per_token = _masked(mask, smoothed_cross_entropy(output.decoder_logits, targets, smoothing))
    total = jnp.maximum(jnp.sum(mask), 1)
    right = _masked(mask, jnp.argmax(output.decoder_logits, axis=-1) == targets)
    loss = jnp.sum(per_token) / total
    metrics = {
        "decoder_loss": loss,
        "decoder_accuracy": jnp.sum(right) / total,
        "num_text_tokens": jnp.sum(mask),
    }
    return loss, jnp.sum(per_token, axis=1), metrics


def _pitch_loss(
    pitch: Float[Array, "B L"],
    num_speech_tokens: Int[Array, " B"],
    batch: Mapping[str, Array],
    rows: Bool[Array, " B"],
) -> tuple[Float[Array, " B"], Array]:
    """L1 in units of 100 Hz over the valid frames (the public code's mask keeps the padding instead), and their number."""
    mask = length_mask(num_speech_tokens, pitch.shape[1]) & rows[:, None]
    if "f0_mask" in batch:
        mask = mask & batch["f0_mask"]
    error = _masked(mask, jnp.abs(pitch - jax.lax.stop_gradient(batch["f0"])) / PITCH_UNIT_HZ)
    return jnp.sum(error, axis=1), jnp.sum(mask)
