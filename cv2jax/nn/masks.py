"""Boolean masks (True = keep), built from lengths and combined with `&`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def length_mask(lengths: Int[Array, " B"], size: int) -> Bool[Array, "B size"]:
    """True at the positions before each row's length."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def key_mask(mask: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """A position mask over keys, broadcast over heads and queries, as `attend` wants it."""
    return mask[:, None, None, :]


def causal_mask(num_queries: int, num_keys: int, first_query: int | Int[Array, ""] = 0) -> Bool[Array, "1 1 T S"]:
    """True where a key is not later than the query; `first_query` is the position of query 0 (a cache's fill)."""
    queries = jnp.arange(num_queries)[:, None] + first_query
    return (jnp.arange(num_keys)[None, :] <= queries)[None, None]
