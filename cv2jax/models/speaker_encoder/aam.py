"""AAM-softmax: classification of speakers by angle, with a margin that grows (Deng et al. 2019; spec/frontends.md 2.5)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_START, _END = 1.0, 1e-3  # of the exponential that the margin falls short by


def margin_at(step: Int[Array, ""], *, margin: float, start: int, end: int) -> Float[Array, ""]:
    """The margin of a step in radians: 0 up to `start`, `margin` from `end` on, exponential between (wespeaker's schedule)."""
    done = (step - start) / max(end - start, 1)
    ratio = 1.0 - jnp.exp(done * math.log(_END / (_START + 1e-6))) * _START
    return margin * jnp.where(step >= end, 1.0, jnp.where(step <= start, 0.0, ratio))


def aam_logits(
    embedding: Float[Array, "B E"],
    classes: Float[Array, "E V"],
    labels: Int[Array, " B"],
    margin: Float[Array, ""],
    scale: float,
) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
    """(scaled logits with the margin on the label's angle, cosines without), fp32.

    cos(θ + m) falls in θ only up to π - m; beyond it stands cos θ - (1 + cos(π - m)), as in 3D-Speaker.
    """
    unit = embedding * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(embedding), 1, keepdims=True), 1e-12))
    weights = classes * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(classes), 0, keepdims=True), 1e-12))
    cosine = jnp.matmul(unit, weights, precision="highest")
    sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 1e-12))
    shifted = cosine * jnp.cos(margin) - sine * jnp.sin(margin)
    limit = jnp.cos(math.pi - margin)
    shifted = jnp.where(cosine > limit, shifted, cosine - (1 + limit))
    is_label = labels[:, None] == jnp.arange(classes.shape[1])
    return scale * jnp.where(is_label, shifted, cosine), cosine


def aam_loss(
    embedding: Float[Array, "B E"],
    classes: Float[Array, "E V"],
    labels: Int[Array, " B"],
    margin: Float[Array, ""],
    scale: float,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(cross-entropy of each row, whether the nearest class is its own: 0 or 1)."""
    logits, cosine = aam_logits(embedding, classes, labels, margin, scale)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    right = (jnp.argmax(cosine, axis=1) == labels).astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=1) - own, right
