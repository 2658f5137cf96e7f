"""Key/value caches of a stream: rings of slots that know which position they hold, and attention over them.

A step reads the caches and hands out the keys and values of its own positions only; `append` writes those of all layers
at once. So the caches can stay where they are while a loop over layers or solver steps reads them, and are updated in
place when the caller donates them.
"""

import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.attention import MASKED_LOGIT

KeysValues = tuple[Array, Array]
EMPTY = -1  # position of a slot that holds nothing, and of an input that only fills a shape


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class KeyValueCache:
    """Keys and values of the layers of a stack.

    Attributes:
      keys, values: [N B H S C]. positions: [B S], which position of its row each slot holds, EMPTY for none.
    """

    keys: Float[Array, "N B H S C"]
    values: Float[Array, "N B H S C"]
    positions: Int[Array, "B S"]

    def layer(self, index: int | Int[Array, ""]) -> KeysValues:
        """Keys and values [B H S C] of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys, index, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values, index, keepdims=False),
        )


def init_cache(
    num_layers: int, batch_size: int, num_heads: int, num_slots: int, head_dim: int, dtype: str
) -> KeyValueCache:
    """A cache without entries."""
    shape = (num_layers, batch_size, num_heads, num_slots, head_dim)
    zeros = lambda: jnp.zeros(shape, dtype)  # noqa: E731  (two arrays: one could not be donated twice)
    return KeyValueCache(keys=zeros(), values=zeros(), positions=jnp.full((batch_size, num_slots), EMPTY, jnp.int32))


def append(
    cache: KeyValueCache,
    keys: Float[Array, "N B H T C"],
    values: Float[Array, "N B H T C"],
    *,
    positions: Int[Array, "B T"],
    num_pinned: Int[Array, " B"],
) -> KeyValueCache:
    """Writes the entries of T positions, rising along a row; EMPTY ones are left out.

    The first `num_pinned` positions of a row keep a slot each; all others share the rest, where the newest takes the
    place of the oldest.
    """
    num_slots = cache.positions.shape[1]
    pinned = num_pinned[:, None]
    ring = jnp.maximum(num_slots - pinned, 1)
    slots = jnp.where(positions < pinned, positions, pinned + (positions - pinned) % ring)
    # Of positions that share a slot the last one wins, whatever order the scatter takes.
    overwritten = (positions >= pinned) & (positions <= jnp.max(positions, axis=1, keepdims=True) - ring)
    slots = jnp.where((positions == EMPTY) | overwritten, num_slots, slots)

    def write(row: Array, new: Array, at: Int[Array, " T"]) -> Array:
        return row.at[..., at, :].set(new.astype(row.dtype), mode="drop", unique_indices=True)

    over_rows = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    return KeyValueCache(
        keys=over_rows(cache.keys, keys, slots),
        values=over_rows(cache.values, values, slots),
        positions=jax.vmap(lambda row, new, at: row.at[at].set(new, mode="drop"))(cache.positions, positions, slots),
    )


def grow(cache: KeyValueCache, num_slots: int) -> KeyValueCache:
    """The cache with at least `num_slots` slots; only for one that has not begun to share them."""
    more = max(num_slots - cache.positions.shape[1], 0)
    pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, more), (0, 0)))  # noqa: E731
    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=EMPTY)
    return KeyValueCache(keys=pad(cache.keys), values=pad(cache.values), positions=positions)


def attend_cached(
    q: Float[Array, "B T H C"],
    new: KeysValues,
    old: KeysValues,
    mask: Bool[Array, "#B #H T keys"],
    scores: Float[Array, "B H T keys"] | None = None,
) -> Float[Array, "B T H C"]:
    """Attention over the cached keys and values [B H S C] and, behind them, the new ones [B H T C]: S + T keys.

    `scores` are added to the product of queries and keys, before that is scaled by 1/√C; logits and softmax are fp32.
    """
    # The heads stand in front, or XLA on a CPU would copy keys and values to transpose a product's result; and the logits
    # of both parts are never put together, which would copy all of them twice.
    scale, num_old = q.shape[-1] ** -0.5, old[0].shape[2]
    q = jax.lax.optimization_barrier(heads_first(q * scale))

    def logits(k: Float[Array, "B H S C"], part: slice) -> Float[Array, "B H T S"]:
        found = jnp.einsum("bhtc,bhsc->bhts", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        if scores is not None:
            found = found + scores[..., part] * scale
        return found + jnp.where(mask[..., part], 0.0, MASKED_LOGIT)

    parts = logits(old[0], slice(num_old)), logits(new[0], slice(num_old, None))
    largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True, initial=MASKED_LOGIT) for x in parts))
    total, y = jnp.zeros_like(largest), jnp.zeros_like(q, jnp.float32)
    for x, v in zip(parts, (old[1], new[1]), strict=True):
        weights = jnp.exp(x - largest)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        y += jnp.einsum("bhts,bhsc->bhtc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = jax.lax.optimization_barrier((y / total).astype(q.dtype))
    return jnp.swapaxes(y, 1, 2)


def heads_first(x: Float[Array, "B T H C"]) -> Float[Array, "B H T C"]:
    """As caches hold keys and values."""
    return jnp.swapaxes(x, 1, 2)
