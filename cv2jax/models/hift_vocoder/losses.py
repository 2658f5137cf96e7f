"""Adversarial losses of the vocoder (spec/official.md 5.6; upstream's `hifigan/hifigan.py`, `utils/losses.py`).

Each sums over the discriminators, so a weight means the same as upstream only with as many of them.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

FEATURE_WEIGHT = 2.0  # inside the feature matching loss; upstream multiplies it by 2 once more outside
TPR_THRESHOLD = 0.04  # τ: where the truncation of the relative loss sets in

Scores = Sequence[Float[Array, "B _"]]  # one array a discriminator


def adversarial_loss(generated: Scores) -> Float[Array, ""]:
    """Σ mean((1 - D(g))²): what the generator lowers, least squares (Mao et al. 2017)."""
    return _total(jnp.mean(jnp.square(1 - g)) for g in _wide(generated))


def discriminator_loss(real: Scores, generated: Scores) -> Float[Array, ""]:
    """Σ mean((1 - D(r))²) + mean(D(g)²): what the discriminators lower, least squares."""
    pairs = zip(_wide(real), _wide(generated), strict=True)
    return _total(jnp.mean(jnp.square(1 - r)) + jnp.mean(jnp.square(g)) for r, g in pairs)


def feature_matching_loss(
    real: Sequence[Sequence[Float[Array, "B *_"]]], generated: Sequence[Sequence[Float[Array, "B *_"]]]
) -> Float[Array, ""]:
    """2 · Σ mean|fmap_r - fmap_g| over all feature maps of all discriminators, the scores' own included."""
    pairs = [pair for r, g in zip(real, generated, strict=True) for pair in zip(_wide(r), _wide(g), strict=True)]
    return FEATURE_WEIGHT * _total(jnp.mean(jnp.abs(r - g)) for r, g in pairs)


def tpr_loss(real: Scores, generated: Scores, threshold: float = TPR_THRESHOLD) -> Float[Array, ""]:
    """The truncated pointwise relativistic least squares: Σ min(L, τ), of what the discriminators still tell apart.

    m is the lower median of r - g over a discriminator's whole batch, L the mean of (r - g - m)² where r < g + m; 0 where
    that is nowhere. The discriminators lower tpr_loss(real, generated), the generator tpr_loss(generated, real).
    """
    differences = [r - g for r, g in zip(_wide(real), _wide(generated), strict=True)]
    medians = lower_medians(differences)
    return _total(_tpr(d - m, threshold) for d, m in zip(differences, medians, strict=True))


def _tpr(deviation: Float[Array, "B _"], threshold: float) -> Float[Array, ""]:
    below = deviation < 0
    loss = jnp.sum(jnp.where(below, jnp.square(deviation), 0)) / jnp.maximum(jnp.sum(below), 1)
    return threshold - jax.nn.relu(threshold - loss)


def lower_medians(arrays: Sequence[Float[Array, "..."]]) -> list[Float[Array, ""]]:
    """Of each array in fp32 the ⌈n/2⌉-th smallest value, as `torch.median` has it; what has it shares its gradient.

    Found bit by bit by counting what is less, so that a split batch is never gathered; sorting whole batches took most of the
    time of compiling for a TPU.
    """
    keys = [_ordered(jax.lax.stop_gradient(x)) for x in arrays]
    ranks = jnp.array([(x.size - 1) // 2 for x in arrays])

    def add_bit(i: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        num_less = jnp.stack([jnp.sum(key < t) for key, t in zip(keys, tried, strict=True)])
        return jnp.where(num_less <= ranks, tried, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(len(keys), jnp.uint32))
    have_it = [key == f for key, f in zip(keys, found, strict=True)]
    return [jnp.sum(jnp.where(has, x, 0)) / jnp.sum(has) for x, has in zip(arrays, have_it, strict=True)]


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Numbers that are ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _wide(arrays: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
    return [a.astype(jnp.float32) for a in arrays]


def _total(values: Iterable[Float[Array, ""]]) -> Float[Array, ""]:
    return sum(values, start=jnp.zeros(()))
