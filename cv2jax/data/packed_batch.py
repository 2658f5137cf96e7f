"""The batch of packed rows: laid-out utterances behind one another, and the coin that decides how each is laid out."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, Integer

from cv2jax.config import UserError
from cv2jax.data.permutation import fold_key, mix64

IGNORE = -1  # target of padding, as in the rows that are packed
NO_UTTERANCE = -1
_COINS = 2  # what this key of the seed is for; packing.py has the others


@runtime_checkable
class _LaidOutRow(Protocol):
    """One utterance laid out for the model: int32 [P] each (`models/text_speech_lm/sequence.py`)."""

    @property
    def token(self) -> np.ndarray: ...

    @property
    def kind(self) -> np.ndarray: ...

    @property
    def targets(self) -> np.ndarray: ...


def bistream_coins(seed: int, epoch: int, utterances: Int64[np.ndarray, "B"]) -> Float64[np.ndarray, "B"]:
    """Each utterance's coin of an epoch, uniform in [0, 1): a keyed hash, the same wherever the utterance is placed."""
    key = np.uint64(fold_key(seed, _COINS, epoch))
    # Hashed, then keyed, then hashed again: else two keys could give one sequence, shifted.
    bits = mix64(mix64(utterances.astype(np.uint64)) ^ key)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pack_rows(
    rows: Sequence[Sequence[_LaidOutRow]],
    utterances: Sequence[Integer[np.ndarray, "_"]],
    *,
    length: int,
    max_segments: int,
) -> dict[str, np.ndarray]:
    """Puts the laid-out utterances of each row behind one another: a batch of B rows of P = `length` positions.

    int32 [B P]: `token`, `kind`; `targets`, IGNORE in padding; `positions`, from 0 in each utterance and in padding;
    `segments`, 1, 2, … in a row and 0 in padding. int32 [B, max_segments]: `utterance`, the index of each segment's
    utterance, -1 behind the last. Raises UserError for a row that takes more positions or segments than there are.
    """
    num_segments = np.array([len(row) for row in rows], np.int64)
    laid_out = [utterance for row in rows for utterance in row]
    sizes = np.array([len(utterance.token) for utterance in laid_out], np.int64)
    row_of = np.repeat(np.arange(len(rows)), num_segments)
    segment_of = np.arange(len(laid_out)) - np.repeat(np.cumsum(num_segments) - num_segments, num_segments)
    taken = np.bincount(row_of, sizes, minlength=len(rows)).astype(np.int64)
    for i in np.flatnonzero((taken > length) | (num_segments > max_segments)):
        raise UserError(
            f"packed row {i}: {num_segments[i]} utterances of {taken[i]} positions, but a row holds {max_segments} of"
            f" {length}; pack rows of the lengths that were planned"
        )
    before = np.cumsum(sizes) - sizes  # positions of all utterances in front, then those of the rows in front off again
    first = row_of * length + before - (np.cumsum(taken) - taken)[row_of]
    within = np.arange(sizes.sum()) - np.repeat(before, sizes)
    place = np.repeat(first, sizes) + within

    keys = ("token", "kind", "targets")
    flat = {key: np.zeros(len(rows) * length, np.int32) for key in (*keys, "positions", "segments")}
    flat["targets"].fill(IGNORE)
    for key in keys if laid_out else ():
        flat[key][place] = np.concatenate([getattr(utterance, key) for utterance in laid_out])
    flat["positions"][place] = within
    flat["segments"][place] = np.repeat(segment_of + 1, sizes)
    batch = {key: values.reshape(len(rows), length) for key, values in flat.items()}
    batch["utterance"] = np.full((len(rows), max_segments), NO_UTTERANCE, np.int32)
    batch["utterance"][row_of, segment_of] = np.concatenate([*utterances, np.zeros(0, np.int64)])
    return batch
