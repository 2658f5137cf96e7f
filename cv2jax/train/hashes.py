"""Sums that name the contents of arrays: equal on any mesh and any number of hosts, because they wrap and never round."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array_hash(values: jax.Array, salt: Any) -> jax.Array:
    """A uint32 of every element of an array and its place; `salt` (an integer) tells arrays apart."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        values = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    place = jnp.full(values.shape, salt, jnp.uint32)
    for axis in range(values.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    return jnp.sum((values.astype(jnp.uint32) + 1) * (place | 1), dtype=jnp.uint32)


def batch_hash(batch: dict[str, jax.Array]) -> jax.Array:
    """A uint32 of everything in a global batch.

    Logged with every step, so that two runs can be seen to have read the same audio in the same order.
    """
    total = jnp.zeros((), jnp.uint32)
    for salt, (_, values) in enumerate(sorted(batch.items()), start=1):
        total = total + array_hash(values, salt)
    return total


_hash_leaf = jax.jit(array_hash)  # compiled once a shape: moments and layers have those of other leaves


def state_hash(state: Any) -> int:
    """The same of every leaf of a pytree; waits for it. Reads the state once, and takes no memory of its size."""
    parts = [_hash_leaf(leaf, np.uint32(salt)) for salt, leaf in enumerate(jax.tree.leaves(state), start=1)]
    return int(np.sum(jax.device_get(parts), dtype=np.uint32))
