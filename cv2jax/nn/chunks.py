"""Chunk masks described in numbers: who sees whom where sequences are cut into chunks; no flax, as a server needs it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cv2jax.shapes import Bool, Int

NO_CHUNK = NO_LEFT = 1 << 30  # of a chunk that holds everything, of a left context without an end


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkMask:
    """A position sees its own chunk and what lies before it: all of it, or a left context and the prompt.

    Chunk 1 is causal, NO_CHUNK sees everything: the four masks of the paper (2.4) differ in this number alone.

    Attributes:
      chunk: positions of a chunk. left: how many positions before its chunk a query sees; None: all.
      prompt: positions at the start that are seen however bounded the left context is.

    Raises ValueError for a chunk below 1, a left context or a prompt below 0.
    """

    chunk: int
    left: int | None = None
    prompt: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1 or (self.left or 0) < 0 or self.prompt < 0:
            raise ValueError(f"{self}: a chunk is at least 1, a left context and a prompt at least 0")

    @property
    def name(self) -> str:
        """As tables, warnings and directories call it: "all", "causal", "chunk 25", "chunk 25 left 50 prompt 75"."""
        kind = {NO_CHUNK: "all", 1: "causal"}.get(self.chunk, f"chunk {self.chunk}")
        bound = "" if self.left is None else f" left {self.left}"
        return kind + bound + (f" prompt {self.prompt}" if self.prompt else "")

    def scaled(self, factor: int) -> "ChunkMask":
        """The same mask where each position becomes `factor` of them."""
        return ChunkMask(
            chunk=_scaled(self.chunk, factor),
            left=None if self.left is None else _scaled(self.left, factor),
            prompt=self.prompt * factor,
        )

    def sees(self, queries: Int[np.ndarray, "..."], keys: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Whether each query position sees the key position beside it; the arrays broadcast."""
        start = queries // self.chunk * self.chunk
        seen = keys < start + self.chunk
        if self.left is None:
            return seen
        return seen & ((keys >= start - self.left) | (keys < self.prompt))


def stream_mask(masks: Sequence[ChunkMask]) -> ChunkMask:
    """The narrowest of the trained masks that streams in hops of more than a token; else what comes nearest to it."""
    by_chunk = sorted(masks, key=lambda mask: mask.chunk)
    return next((mask for mask in by_chunk if 1 < mask.chunk < NO_CHUNK), by_chunk[0])


def choose_mask(masks: Sequence[ChunkMask], *, chunk: int | None = None, left: int | None = None) -> ChunkMask:
    """The mask to stream under, without a prompt: `stream_mask` of the trained ones, or the first of them with that chunk.

    Args:
      chunk: None: that of `stream_mask`. left: positions of left context, -1: without an end; None: as trained with that chunk.
    """
    streams = stream_mask(masks)
    chunk = streams.chunk if chunk is None else chunk
    found = next((mask for mask in (streams, *masks) if mask.chunk == chunk), ChunkMask(chunk=chunk))
    bound = found.left if left is None else None if left < 0 else left
    return dataclasses.replace(found, left=bound, prompt=0)


def _scaled(number: int, factor: int) -> int:
    return number if number >= NO_CHUNK else number * factor
