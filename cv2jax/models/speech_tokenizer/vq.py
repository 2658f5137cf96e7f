"""Vector quantisation with a codebook learnt by exponential moving averages: the baseline of the paper's Table 4.

The codebook is no parameter: it lives in an explicit state that goes in and comes out (CosyVoice 1; van den Oord 2017, A.1).
"""

import dataclasses
import typing

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from cv2jax.nn.layers import partitioned

COUNT_EPSILON = 1e-5  # Laplace smoothing of the counts, so that an unused code never divides by zero


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class VqState:
    """The codebook and the moving averages it is computed from, all fp32."""

    codebook: Float[Array, "V D"]  # one vector a code
    counts: Float[Array, " V"]  # moving average of how many vectors chose the code; all zero: not yet initialised
    sums: Float[Array, "V D"]  # moving average of the sum of those vectors


def init_vq_state(codebook_size: int, width: int, key: Key[Array, ""]) -> VqState:
    """A Gaussian codebook with unit RMS and zero counts, boxed with logical axes like parameters.

    The first training batch replaces it by its own vectors (`init_from_data`): plain EMA from noise would collapse at once.
    """

    zeros, shape, axes = nn.initializers.zeros, (codebook_size, width), ("codebook", "embed")
    return VqState(
        codebook=partitioned(nn.initializers.normal(1.0), axes)(key, shape, jnp.float32),
        counts=partitioned(zeros, axes[:1])(key, shape[:1], jnp.float32),
        sums=partitioned(zeros, axes)(key, shape, jnp.float32),
    )


def normalize(hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Scales each vector to unit RMS in fp32: CosyVoice 1's L2 normalisation times √D, so the same nearest neighbours."""
    x = hidden.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


def nearest_codes(vectors: Float[Array, "B L D"], codebook: Float[Array, "V D"]) -> Int[Array, "B L"]:
    """Ids of the codes with the smallest squared distance; the lowest id wins a tie."""
    products = jnp.einsum("bld,vd->blv", vectors, codebook, precision="highest")
    return jnp.argmax(products - 0.5 * jnp.sum(jnp.square(codebook), axis=-1), axis=-1).astype(jnp.int32)


def _draw_vectors(
    key: Key[Array, ""], vectors: Float[Array, "B L D"], mask: Bool[Array, "B L"], number: int
) -> Float[Array, "number D"]:
    """`number` vectors drawn with replacement from the True positions of the whole (global) batch."""
    weights = mask.reshape(-1).astype(jnp.float32)
    chosen = jax.random.choice(key, weights.shape[0], (number,), p=weights / jnp.maximum(jnp.sum(weights), 1.0))
    return vectors.reshape(-1, vectors.shape[-1])[chosen]


def init_from_data(
    state: VqState, vectors: Float[Array, "B L D"], mask: Bool[Array, "B L"], key: Key[Array, ""]
) -> VqState:
    """Fills a never-updated codebook (all counts zero) with vectors of the batch; otherwise returns the state as it is."""

    def fill(_: None) -> Float[Array, "V D"]:
        return _draw_vectors(key, vectors, mask, state.codebook.shape[0])

    fresh = ~jnp.any(state.counts > 0) & jnp.any(mask)
    return dataclasses.replace(state, codebook=jax.lax.cond(fresh, fill, lambda _: state.codebook, None))


def update_vq_state(
    state: VqState,
    vectors: Float[Array, "B L D"],
    ids: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    key: Key[Array, ""],
    *,
    decay: float,
    restart_below: float = 0.0,
) -> VqState:
    """One EMA step over the True positions of the global batch.

    counts ← decay·counts + (1-decay)·n, sums ← decay·sums + (1-decay)·Σx, codebook ← sums / smoothed counts. The first
    step takes n and Σx undecayed. A code never chosen so far keeps its vector. With `restart_below` > 0, codes whose
    average count falls below it are replaced by random vectors of the batch (off in the paper's plain EMA).
    """
    size = state.codebook.shape[0]
    weights = mask.reshape(-1).astype(jnp.float32)
    flat = vectors.reshape(-1, vectors.shape[-1]) * weights[:, None]
    counts = jnp.zeros((size,), jnp.float32).at[ids.reshape(-1)].add(weights)
    sums = jnp.zeros_like(state.sums).at[ids.reshape(-1)].add(flat)
    keep = jnp.where(jnp.any(state.counts > 0), decay, 0.0)
    counts = keep * state.counts + (1 - keep) * counts
    sums = keep * state.sums + (1 - keep) * sums
    total = jnp.sum(counts)
    smoothed = (counts + COUNT_EPSILON) / (total + size * COUNT_EPSILON) * total
    used = counts > COUNT_EPSILON
    codebook = jnp.where(used[:, None], sums / jnp.maximum(smoothed, COUNT_EPSILON)[:, None], state.codebook)
    if restart_below > 0:
        dead = counts < restart_below
        drawn = _draw_vectors(key, vectors, mask, size)
        codebook = jnp.where(dead[:, None], drawn, codebook)
        counts = jnp.where(dead, restart_below, counts)  # a full grace period before it can be restarted again
        sums = jnp.where(dead[:, None], drawn * restart_below, sums)
    updated = VqState(codebook=codebook, counts=counts, sums=sums)
    # A batch without any valid position (every row padded) must leave the state alone, not decay it.
    return jax.tree.map(lambda new, old: jnp.where(jnp.any(mask), new, old), updated, state)


def quantize(
    vectors: Float[Array, "B L D"], mask: Bool[Array, "B L"], codebook: Float[Array, "V D"]
) -> tuple[Float[Array, "B L D"], Int[Array, "B L"], Float[Array, ""]]:
    """Returns (nearest codes with a straight-through gradient, ids, commitment loss).

    The commitment loss is the mean squared distance of the True vectors to their codes, codes held fixed.
    """
    ids = nearest_codes(jax.lax.stop_gradient(vectors), codebook)
    codes = jax.lax.stop_gradient(codebook[ids])
    distance = jnp.where(mask, jnp.mean(jnp.square(vectors - codes), axis=-1), 0.0)
    commitment = jnp.sum(distance) / jnp.maximum(jnp.sum(mask), 1)
    return vectors + jax.lax.stop_gradient(codes - vectors), ids, commitment
