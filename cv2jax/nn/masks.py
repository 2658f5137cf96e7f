"""Boolean masks (True = keep), built from lengths and combined with `&`, and masks described for a kernel to compute."""

import dataclasses
import typing

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cv2jax.nn.chunks import NO_CHUNK, NO_LEFT, ChunkMask


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


KINDS = ("full", "causal", "chunk")


def chunk_array(
    chunk: Int[Array, " #B"],
    left: Int[Array, " #B"],
    prompt: Int[Array, " #B"],
    queries: Int[Array, "#B T"],
    keys: Int[Array, "#B S"],
) -> Bool[Array, "#B 1 T S"]:
    """`ChunkMask` of each row as data, between any positions: True where query t sees key s.

    NO_LEFT is a left context without an end. A key at a negative position is an empty slot, which nobody sees.
    """
    chunk, left, prompt = (x[:, None, None] for x in (chunk, left, prompt))
    queries, keys = queries[:, :, None], keys[:, None, :]
    start = queries // chunk * chunk  # differences, as start + chunk could overflow
    seen = (keys - start < chunk) & ((start - keys <= left) | (keys < prompt)) & (keys >= 0)
    return seen[:, None]


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class MaskSpec:
    """Which positions of a sequence see each other, before it is an array: kernels compute it and skip what is masked.

    Positions of equal segment see each other, as far as `kind` allows. Padding is a segment of its own, so that no row
    is empty and nothing it computes can be NaN. Raises ValueError for an unknown kind.

    Attributes:
      kind: "full", "causal" (no key later than the query) or "chunk" (see `ChunkMask`); static under `jax.jit`.
      segments: of packed utterances, 0 = padding; None: one segment without padding.
      rows: of kind "chunk", static: row r of a batch has mask r mod len(rows), which kernels need.
      chunk, left, prompt: of kind "chunk" without `rows`, the mask of each row [B] as data (see `chunk_array`).
    """

    kind: str = flax.struct.field(default="full", pytree_node=False)
    segments: Int[Array, "B T"] | None = None
    rows: tuple[ChunkMask, ...] = flax.struct.field(default=(), pytree_node=False)
    chunk: typing.Any = None
    left: typing.Any = None
    prompt: typing.Any = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        is_chunk, has_data = self.kind == "chunk", self.chunk is not None
        if is_chunk == (not self.rows and not has_data) or (self.rows and has_data):
            raise ValueError(
                f"a mask of kind {self.kind!r} has `rows` or data of chunks where it is 'chunk', never both"
            )

    def require(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError when there are segments, of another length than the queries and keys."""
        if self.segments is not None and not self.segments.shape[1] == num_queries == num_keys:
            length = self.segments.shape[1]
            raise ValueError(f"segments of length {length} cannot mask {num_queries} queries and {num_keys} keys")

    def scaled(self, factor: int) -> "MaskSpec":
        """A chunk mask without segments where each position becomes `factor` of them; ValueError for another."""
        if self.kind != "chunk" or self.segments is not None:
            raise ValueError("only a chunk mask without segments can be scaled")
        if self.rows:
            return dataclasses.replace(self, rows=tuple(row.scaled(factor) for row in self.rows))
        chunk, left = (jnp.where(x < NO_CHUNK, x * factor, x) for x in (self.chunk, self.left))
        return dataclasses.replace(self, chunk=chunk, left=left, prompt=self.prompt * factor)

    def as_data(self, num_rows: int) -> "MaskSpec":
        """The same mask with the chunk masks of its rows as data."""
        if not self.rows:
            return self
        rows = [self.rows[row % len(self.rows)] for row in range(num_rows)]
        numbers = [(row.chunk, NO_LEFT if row.left is None else row.left, row.prompt) for row in rows]
        chunk, left, prompt = jnp.asarray(numbers, jnp.int32).T
        return dataclasses.replace(self, rows=(), chunk=chunk, left=left, prompt=prompt)

    def array(self, num_queries: int, num_keys: int, num_rows: int = 1) -> Bool[Array, "#B 1 T S"]:
        """True where query t sees key s, for all heads; ValueError as `require`.

        `num_rows` of the batch matters only where rows of static masks have no segments, which would tell.
        """
        self.require(num_queries, num_keys)
        mask = jnp.ones((1, 1, num_queries, num_keys), bool)
        if self.kind == "causal":
            mask = causal_mask(num_queries, num_keys)
        elif self.kind == "chunk":
            size = num_rows if self.segments is None else self.segments.shape[0]
            data = self.as_data(1 if len(self.rows) == 1 else size)
            queries, keys = jnp.arange(num_queries)[None], jnp.arange(num_keys)[None]
            mask = chunk_array(data.chunk, data.left, data.prompt, queries, keys)
        if self.segments is None:
            return mask
        return mask & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
