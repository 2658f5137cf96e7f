"""Relative positions in the form of espnet: sinusoids of i − j, of both signs (wenet `transformer/embedding.py`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_PERIOD = 10000.0


def sinusoid(positions: Int[Array, "..."], width: int) -> Float[Array, "... D"]:
    """sin(p·w_m) and cos(p·w_m) side by side, w_m = 10000^(−2m/D): fp32, whatever computes with them."""
    angles = _angles(positions, width)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, width)


def relative_sinusoid(length: int, width: int) -> Float[Array, "R D"]:
    """`sinusoid` of the R = 2·length − 1 distances i − j between `length` positions, the largest first."""
    return sinusoid(jnp.arange(length - 1, -length, -1), width)


def shift(scores: Float[Array, "B H T R"]) -> Float[Array, "B H T T"]:
    """Scores of every query for the R = 2·T − 1 distances, the largest first, as scores for its T keys.

    Row i keeps the R entries from T − 1 − i on. Padded by one and read as rows of R, each row starts one place later.
    """
    *rows, length, num_distances = scores.shape
    flat = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)]).reshape(*rows, num_distances + 1, length)
    return flat[..., 1:, :].reshape(*rows, length, num_distances)[..., :length]


def rotate_queries(weights: Float[Array, "B T H D"], positions: Int[Array, "#B T"]) -> Float[Array, "B T H D"]:
    """Vectors whose product with `sinusoid(j, D)` is that of `weights` with `sinusoid(i − j, D)`, i of `positions`.

    sin(i − j) and cos(i − j) are sums of products of terms of i and of j alone, so keys at any positions can be scored
    without a table of distances.
    """
    angles = _angles(positions, weights.shape[-1])[:, :, None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    of_sin, of_cos = weights[..., 0::2], weights[..., 1::2]
    turned = [of_cos * sin - of_sin * cos, of_sin * sin + of_cos * cos]  # what multiplies sin(j) and cos(j)
    return jnp.stack(turned, axis=-1).reshape(weights.shape)


def _angles(positions: Int[Array, "..."], width: int) -> Float[Array, "... D_half"]:
    frequencies = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * -(jnp.log(MAX_PERIOD) / width))
    return positions[..., None].astype(jnp.float32) * frequencies
