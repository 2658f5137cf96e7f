"""Boolean masks (True = keep), built from lengths and combined with `&`, and masks described for a kernel to compute."""

import typing

import flax
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


KINDS = ("full", "causal")


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class MaskSpec:
    """Which positions of a sequence see each other, before it is an array: kernels compute it and skip what is masked.

    Positions of equal segment see each other, as far as `kind` allows. Padding is a segment of its own, so that no row
    is empty and nothing it computes can be NaN. Raises ValueError for an unknown kind.

    Attributes:
      kind: "full", or "causal" (no key later than the query); static under `jax.jit`.
      segments: of packed utterances, 0 = padding; None: one segment without padding.
    """

    kind: str = flax.struct.field(default="full", pytree_node=False)
    segments: Int[Array, "B T"] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")

    def require(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError when there are segments, of another length than the queries and keys."""
        if self.segments is not None and not self.segments.shape[1] == num_queries == num_keys:
            length = self.segments.shape[1]
            raise ValueError(f"segments of length {length} cannot mask {num_queries} queries and {num_keys} keys")

    def array(self, num_queries: int, num_keys: int) -> Bool[Array, "#B 1 T S"]:
        """True where query t sees key s, for all heads; ValueError as `require`."""
        self.require(num_queries, num_keys)
        mask = jnp.ones((1, 1, num_queries, num_keys), bool)
        if self.kind == "causal":
            mask = causal_mask(num_queries, num_keys)
        if self.segments is None:
            return mask
        return mask & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
