"""Key/value caches of a stream: rings of slots that know which position they hold, and attention over them.

A step reads the caches and hands out the keys and values of its own positions only; `write` puts those of many layers
into them at once. So the caches stay where they are while a loop over layers reads them, and are updated in place when the
caller donates them.
"""

import dataclasses
import functools
import typing

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.attention import MASKED_LOGIT
from cv2jax.parallel.sharding import platform

KeysValues = tuple[Array, Array]
_SHARES = 8  # of a cache's slots, into which it is filled
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

    def layer(self, index: int | Int[Array, ""], num_slots: int) -> KeysValues:
        """Keys and values [B H S C] of the first slots of one layer."""

        def of_layer(stacked: Float[Array, "N B H S C"]) -> Float[Array, "B H S C"]:
            _, *rows_heads, _, head_dim = stacked.shape
            return jax.lax.dynamic_slice(stacked, (index, 0, 0, 0, 0), (1, *rows_heads, num_slots, head_dim))[0]

        return of_layer(self.keys), of_layer(self.values)


def init_cache(
    num_layers: int, batch_size: int, num_heads: int, num_slots: int, head_dim: int, dtype: str
) -> KeyValueCache:
    """A cache without entries."""
    shape = (num_layers, batch_size, num_heads, num_slots, head_dim)
    zeros = lambda: jnp.zeros(shape, dtype)  # noqa: E731  (two arrays: one could not be donated twice)
    return KeyValueCache(keys=zeros(), values=zeros(), positions=jnp.full((batch_size, num_slots), EMPTY, jnp.int32))


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class Slots:
    """Where the entries of T positions go.

    Attributes:
      start: [B], the first of a row's positions, EMPTY if it has none. first: [B], its slot.
      num_pinned: [B]. fits: [B], whether no slot has been shared before T more are written.
      positions: [B S], of the cache behind them. is_new: [B S], which of those are among them.
    """

    start: Int[Array, " B"]
    first: Int[Array, " B"]
    num_pinned: Int[Array, " B"]
    fits: Bool[Array, " B"]
    positions: Int[Array, "B S"]
    is_new: Bool[Array, "B S"]


def find_slots(cache: KeyValueCache, positions: Int[Array, "B T"], num_pinned: Int[Array, " B"]) -> Slots:
    """Slots for T positions: of a row the next ones without a gap and EMPTY behind them, which get none.

    The first `num_pinned` positions of a row keep a slot each; all others share the rest, where the newest takes the
    place of the oldest.
    """
    num_slots, slots = cache.positions.shape[1], jnp.arange(cache.positions.shape[1])
    pinned, start = num_pinned[:, None], positions[:, :1]
    end = start + jnp.sum(positions != EMPTY, axis=1, keepdims=True)
    ring = jnp.maximum(num_slots - pinned, 1)
    newest = end - 1 - (end - 1 - slots) % ring  # that a shared slot may hold now
    held = jnp.where(slots < pinned, slots, newest)
    is_new = (held >= start) & (held < end) & ((slots < pinned) | (held >= pinned))
    return Slots(
        start=start[:, 0],
        first=jnp.where(start < pinned, start, pinned + (start - pinned) % ring)[:, 0],
        num_pinned=num_pinned,
        fits=start[:, 0] + positions.shape[1] <= num_slots,
        positions=jnp.where(is_new, held, cache.positions),
        is_new=is_new,
    )


def write(cache: KeyValueCache, entries: KeysValues, slots: Slots, first_layer: int | Int[Array, ""]) -> KeyValueCache:
    """The keys and values [layers B H T C] of some layers, in place; `positions` remain those before them.

    Not a scatter: XLA would copy the caches to bring their slots to the front, and back. Nor conditions, whose branches copy
    them too, but on a CPU loops of no or one pass; elsewhere the device would wait for the host at each, and windows do.
    """
    caches, num_slots, length = (cache.keys, cache.values), cache.keys.shape[3], entries[0].shape[3]
    size = min(length, num_slots)

    def put(old: Float[Array, "N B H S C"], new: Float[Array, "layers 1 H _ C"], row: int, at: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (first_layer, row, 0, at, 0))

    def put_all(row: int, _: Int[Array, ""], caches: KeysValues) -> KeysValues:
        """As they are, while no position has lost its slot: those behind the row's own hold nothing."""
        keys, values = (
            put(old, new[:, row : row + 1], row, slots.start[row]) for old, new in zip(caches, entries, strict=True)
        )
        return keys, values

    def put_window(row: int, window: Int[Array, ""], caches: KeysValues) -> KeysValues:
        """What changes of `size` slots; where the ring closes, the rest lies in a second window."""
        at = jnp.minimum(jnp.where(window == 0, slots.first[row], slots.num_pinned[row]), num_slots - size)
        part = lambda x: jax.lax.dynamic_slice_in_dim(x[row], at, size)  # noqa: E731
        taken, changes = part(slots.positions) - slots.start[row], part(slots.is_new)[:, None]

        def merge(old: Float[Array, "N B H S C"], new: Float[Array, "layers B H T C"]) -> Float[Array, "N B H S C"]:
            new, place = new[:, row : row + 1], (first_layer, row, 0, at, 0)
            kept = jax.lax.dynamic_slice(old, place, (*new.shape[:3], size, new.shape[4]))
            found = jnp.take(new, taken, axis=3, mode="clip").astype(old.dtype)
            return put(old, jnp.where(changes, found, kept), row, at)

        return merge(caches[0], entries[0]), merge(caches[1], entries[1])

    for row in range(cache.positions.shape[0]):
        if platform() != "cpu":
            caches = put_window(row, jnp.array(1), put_window(row, jnp.array(0), caches))
            continue
        has_any, fits = slots.start[row] != EMPTY, slots.fits[row]
        if length <= num_slots:
            passes = (has_any & fits).astype(int)
            caches = jax.lax.fori_loop(0, passes, functools.partial(put_all, row), caches)
        passes = jnp.where(slots.first[row] + length > num_slots, 2, 1)
        passes = jnp.where(has_any & ~fits, passes, 0)
        caches = jax.lax.fori_loop(0, passes, functools.partial(put_window, row), caches)
    return KeyValueCache(keys=caches[0], values=caches[1], positions=cache.positions)


def append(
    cache: KeyValueCache, entries: KeysValues, *, positions: Int[Array, "B T"], num_pinned: Int[Array, " B"]
) -> KeyValueCache:
    """Writes the keys and values [N B H T C] of T positions, as `find_slots` describes."""
    slots = find_slots(cache, positions, num_pinned)
    return dataclasses.replace(write(cache, entries, slots, 0), positions=slots.positions)


def grow(cache: KeyValueCache, num_slots: int) -> KeyValueCache:
    """The cache with at least `num_slots` slots; only for one that has not begun to share them."""
    more = max(num_slots - cache.positions.shape[1], 0)
    pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, more), (0, 0)))  # noqa: E731
    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=EMPTY)
    return KeyValueCache(keys=pad(cache.keys), values=pad(cache.values), positions=positions)


def refill(used: KeyValueCache, cache: KeyValueCache) -> KeyValueCache:
    """`cache` in the memory of one with as many slots or more, if that is donated; as `grow`."""
    more = used.positions.shape[1] - cache.positions.shape[1]
    put = lambda into, x: jax.lax.dynamic_update_slice(into, x, (0,) * x.ndim)  # noqa: E731
    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=EMPTY)
    return KeyValueCache(keys=put(used.keys, cache.keys), values=put(used.values, cache.values), positions=positions)


def attend_cached(
    q: Float[Array, "B T H C"],
    new: KeysValues,
    cache: KeyValueCache,
    layer: int | Int[Array, ""],
    mask: Bool[Array, "#B #H T keys"],
    scores: Float[Array, "B H T keys"] | None = None,
) -> Float[Array, "B T H C"]:
    """Attention over the S cached keys of a layer and, behind them, the new ones [B H T C]: S + T keys.

    `scores` are added to the product of queries and keys, before that is scaled by 1/√C; logits and softmax are fp32.
    """
    # The heads stand in front, or XLA on a CPU would copy keys and values to transpose a product's result; and the logits
    # of both parts are never put together, which would copy all of them twice.
    scale, num_slots = q.shape[-1] ** -0.5, cache.positions.shape[1]
    q = jax.lax.optimization_barrier(heads_first(q * scale))

    def logits(k: Float[Array, "B H S C"], part: slice) -> Float[Array, "B H T S"]:
        found = jnp.einsum("bhtc,bhsc->bhts", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        if scores is not None:
            found = found + scores[..., part] * scale
        return found + jnp.where(mask[..., part], 0.0, MASKED_LOGIT)

    def attend_first(size: int) -> Float[Array, "B H T C"]:
        old = cache.layer(layer, size)
        parts = logits(old[0], slice(size)), logits(new[0], slice(num_slots, None))
        largest = functools.reduce(
            jnp.maximum, (jnp.max(x, axis=-1, keepdims=True, initial=MASKED_LOGIT) for x in parts)
        )
        total, y = jnp.zeros_like(largest), jnp.zeros_like(q, jnp.float32)
        for x, v in zip(parts, (old[1], new[1]), strict=True):
            weights = jnp.exp(x - largest)
            total += jnp.sum(weights, axis=-1, keepdims=True)
            y += jnp.einsum("bhts,bhsc->bhtc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (y / total).astype(q.dtype)

    # Slots that are still empty are hardly read; not on a GPU, which would wait for the host to choose.
    shares = _SHARES if platform() == "cpu" else 1
    sizes = sorted({-(-num_slots * share // shares) for share in range(1, shares + 1)})
    used = jnp.max(jnp.where(cache.positions == EMPTY, 0, 1 + jnp.arange(num_slots)))
    y = jax.lax.switch(
        jnp.searchsorted(np.array(sizes), used), [functools.partial(attend_first, size) for size in sizes]
    )
    return jnp.swapaxes(jax.lax.optimization_barrier(y), 1, 2)


def heads_first(x: Float[Array, "B T H C"]) -> Float[Array, "B H T C"]:
    """As caches hold keys and values."""
    return jnp.swapaxes(x, 1, 2)
