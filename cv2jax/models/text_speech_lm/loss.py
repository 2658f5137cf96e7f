"""The training loss of the text-speech language model and its metrics (paper 2.3; spec/official.md 3.1 and 3.3).

`next_token_loss` takes logits; `chunked_next_token_loss` takes the hidden states and never holds the logits of more than
a chunk of positions. Both reduce every position to a few sums, so packed rows and rows of their own give the same value.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, apply_packed
from cv2jax.models.text_speech_lm.sequence import IGNORE, eos_id
from cv2jax.nn.init import LEVELS, num_digits

TOP = 10  # of `top10_accuracy`


def packed_loss(
    config: TextSpeechLmConfig, params: PyTree, batch: Mapping[str, Int[Array, "B T"]]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of packed rows as the config weighs it, and its metrics; `batch` as `apply_packed`, and `targets`."""
    output = apply_packed(config, params, batch)
    options: dict[str, Any] = {
        "num_speech_tokens": config.num_speech_tokens,
        "label_smoothing": config.label_smoothing,
        "z_loss": config.z_loss,
    }
    if not config.loss_chunk:
        return next_token_loss(output.logits, batch["targets"], **options)
    head = (params["head_kernel"], params["head_bias"])
    return chunked_next_token_loss(output.hidden, *head, batch["targets"], chunk=config.loss_chunk, **options)


def next_token_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    *,
    num_speech_tokens: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean loss over the targets that are not IGNORE, in fp32, and metrics; 0 without any target.

    The mean is over the whole batch, so that every target weighs the same (spec/official.md 3.3). The gradient needs one
    array of the logits' size beside them.

    Args:
      logits: of what follows each position. targets: ids in [0, V), or IGNORE.
      num_speech_tokens: S; the ids behind are stops, the first of them eos.
      label_smoothing: probability that the target gives to all other classes in equal parts; the loss is then the
        divergence KL(target ‖ prediction), as upstream's LabelSmoothingLoss, which is the likelihood's at 0.
      z_loss: weight of the mean squared log-partition, which keeps logits small (PaLM, Chowdhery et al. 2022, 5).

    Returns: (loss, metrics): scalars
      `loss`, `nll` (without smoothing and z-loss), `log_partition` (mean of its magnitude), `num_targets`;
      `accuracy`, `top10_accuracy`; `digit_accuracy` and `digit_accuracy_0` … of the FSQ digits, the lowest first, where
      target and prediction are both speech (none where S is no power of 3);
      `eos_probability_at_eos` and `eos_probability_at_speech` (means over the targets of that kind), `expected_eos` (the
      summed probability) and `num_eos`; and `row_finite` [B] bool, the rows whose loss is finite.
      A mean over nothing is 0.
    """
    return _means(_sums(logits, targets, num_speech_tokens, label_smoothing, z_loss))


def chunked_next_token_loss(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    head_bias: Float[Array, " V"],
    targets: Int[Array, "B T"],
    *,
    num_speech_tokens: int,
    chunk: int = 256,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`next_token_loss` of hidden @ head_kernel + head_bias, `chunk` positions of every row at a time.

    The backward pass computes each chunk's logits again instead of keeping them. The product is in hidden's dtype, the
    logits in fp32, as `TextSpeechLm.logits`.
    """
    num_chunks = -(-targets.shape[1] // chunk)
    padding = num_chunks * chunk - targets.shape[1]

    def cut(x: Array, fill: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def sums_of(hidden: Array, targets: Array, kernel: Array, bias: Array) -> dict[str, Array]:
        # Cast here, not outside: the scan then adds the kernel's gradients up in fp32.
        kernel = kernel.astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32) + bias
        return _sums(logits, targets, num_speech_tokens, label_smoothing, z_loss)

    def body(total: dict[str, Array], inputs: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
        return jax.tree.map(jnp.add, total, sums_of(*inputs, head_kernel, head_bias)), None

    inputs = (cut(hidden, 0), cut(targets, IGNORE))
    shapes = jax.eval_shape(sums_of, inputs[0][0], inputs[1][0], head_kernel, head_bias)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return _means(jax.lax.scan(body, zeros, inputs)[0])


def _sums(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    num_speech_tokens: int,
    label_smoothing: float,
    z_loss: float,
) -> dict[str, Array]:
    """What adds up over positions: the loss of each row [B], and numerator and denominator of every mean."""
    logits = logits.astype(jnp.float32)
    counts = targets != IGNORE
    log_partition, chosen, total = _terms(logits, targets)
    nll = log_partition - chosen
    loss = nll + z_loss * jnp.square(log_partition)
    if label_smoothing:
        others = logits.shape[-1] - 1
        share = label_smoothing / others
        entropy = (1 - label_smoothing) * math.log(1 - label_smoothing) + label_smoothing * math.log(share)
        loss = loss - label_smoothing * nll + share * (others * log_partition - (total - chosen)) + entropy
    held = jax.lax.stop_gradient
    return {
        "row_loss": jnp.sum(jnp.where(counts, loss, 0), axis=1),
        "num_targets": jnp.sum(counts),
        "nll": _sum(held(nll), counts),
        "log_partition": _sum(jnp.abs(held(log_partition)), counts),
        **_hits(held(logits), targets, held(chosen), num_speech_tokens),
        **_calibration(held(logits), targets, held(log_partition), num_speech_tokens),
    }


def _hits(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    chosen: Float[Array, "B T"],
    num_speech_tokens: int,
) -> dict[str, Array]:
    counts, best = targets != IGNORE, jnp.argmax(logits, axis=-1)
    # A target that is not finite is beaten by all; of equals the first wins, as in argmax.
    before = jnp.arange(logits.shape[-1]) < targets[..., None]
    beaten_by = ~(logits <= chosen[..., None]) | ((logits == chosen[..., None]) & before)
    sums = {
        "accuracy": _sum(best == targets, counts),
        "top10_accuracy": _sum(jnp.sum(beaten_by, axis=-1) < TOP, counts),
    }
    digits = num_digits(num_speech_tokens)
    if digits:
        both = counts & (targets < num_speech_tokens) & (best < num_speech_tokens)
        places = LEVELS ** jnp.arange(digits)
        equal = best[..., None] // places % LEVELS == targets[..., None] // places % LEVELS
        sums |= {"digits": _sum(equal, both[..., None], axis=(0, 1)), "num_digits": jnp.sum(both)}
    return sums


def _calibration(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    log_partition: Float[Array, "B T"],
    num_speech_tokens: int,
) -> dict[str, Array]:
    eos, counts = eos_id(num_speech_tokens), targets != IGNORE
    probability = jnp.exp(logits[..., eos] - log_partition)
    at_eos, at_speech = targets == eos, counts & (targets < num_speech_tokens)
    return {
        "eos_probability_at_eos": _sum(probability, at_eos),
        "eos_probability_at_speech": _sum(probability, at_speech),
        "expected_eos": _sum(probability, counts),
        "num_eos": jnp.sum(at_eos),
        "num_speech": jnp.sum(at_speech),
    }


def _sum(values: Array, mask: Bool[Array, "..."], axis: Any = None) -> Array:
    return jnp.sum(jnp.where(mask, values, 0), axis=axis, dtype=jnp.float32)


def _means(sums: dict[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
    def mean(value: Array, count: str) -> Array:
        return value / jnp.maximum(sums[count], 1)

    loss = mean(jnp.sum(sums["row_loss"]), "num_targets")
    metrics = {
        "loss": loss,
        **{name: mean(sums[name], "num_targets") for name in ("nll", "log_partition", "accuracy", "top10_accuracy")},
        "eos_probability_at_eos": mean(sums["eos_probability_at_eos"], "num_eos"),
        "eos_probability_at_speech": mean(sums["eos_probability_at_speech"], "num_speech"),
        **{name: sums[name] for name in ("expected_eos", "num_eos", "num_speech", "num_targets")},
        "row_finite": jnp.isfinite(sums["row_loss"]),
    }
    if "digits" in sums:
        digits = mean(sums["digits"], "num_digits")
        metrics["num_digits"] = sums["num_digits"]
        metrics["digit_accuracy"] = jnp.mean(digits)
        metrics |= {f"digit_accuracy_{place}": digits[place] for place in range(digits.shape[0])}
    return loss, metrics


@jax.custom_vjp
def _terms(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """(log Σ exp, logit of the target, Σ) of each position's logits; an IGNORE target gives and takes no gradient.

    Its own derivative, because the automatic one keeps exp(logits) beside the logits until the backward pass.
    """
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1), chosen, jnp.sum(logits, axis=-1)


def _is_target(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Bool[Array, "B T V"]:
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _terms_forward(logits: Array, targets: Array) -> tuple[Any, Any]:
    terms = _terms(logits, targets)
    return terms, (logits, targets, terms[0])


def _terms_backward(saved: Any, cotangents: Any) -> tuple[Array, None]:
    logits, targets, log_partition = saved
    of_partition, of_chosen, of_total = (g[..., None] for g in cotangents)
    gradient = of_partition * jnp.exp(logits - log_partition[..., None]) + of_total
    gradient = gradient + jnp.where(_is_target(logits, targets), of_chosen, 0)
    return jnp.where((targets != IGNORE)[..., None], gradient, 0), None


_terms.defvjp(_terms_forward, _terms_backward)
