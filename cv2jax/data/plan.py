"""The data order: a pure function (seed, step) → rows of a split, planned ahead from the index's length columns.

Only one array grows with the corpus: the rows sorted by bucket, four bytes each, in a memory-mapped file that every
process of the host shares. The shuffle is a keyed bijection (`permutation.py`), so an epoch needs no table, any step
can be asked for directly, and the number of hosts, workers or devices has no say in it.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt32

from cv2jax.config import UserError
from cv2jax.data.buckets import Bucket, make_buckets
from cv2jax.data.order_file import (
    LEFT_OUT,
    SPEECH_TOKENS_PER_SECOND,
    LeftOut,
    LengthColumns,
    map_order,
    shared_order,
    survey_lengths,
)
from cv2jax.data.permutation import fold_key, permute


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanStats:
    """What a plan uses and what it leaves out: utterances, and the samples of one epoch."""

    num_utterances: int
    left_out: LeftOut
    num_repeated: int  # rows an epoch shows twice to fill the last batch of each bucket
    num_samples: int  # of the utterances
    num_padded_samples: int  # of the utterances, each padded to its bucket

    @property
    def padding_share(self) -> float:
        """Share of the padded samples that is no speech."""
        return 1 - self.num_samples / self.num_padded_samples


class Plan:
    """Buckets, and which rows make up the batch of any step; pickles as a path, so that workers share the order."""

    def __init__(
        self,
        *,
        rate_hz: int,
        seed: int,
        buckets: tuple[Bucket, ...],
        stats: PlanStats,
        digest: str,
        path: pathlib.Path,
        rows: UInt32[np.ndarray, "N"],
    ) -> None:
        self.rate_hz = rate_hz
        self.seed = seed
        self.buckets = buckets
        self.stats = stats
        self.hash = digest  # of the order: equal plans give equal batches at every step
        self._path = path
        self._first_batch = np.cumsum([0, *(bucket.num_batches for bucket in buckets)])
        self._first_row = np.cumsum([0, *(bucket.num_utterances for bucket in buckets)])
        self._rows: np.ndarray | None = rows  # mapped all along, so that nobody removes the file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the same number on every host."""
        return int(self._first_batch[-1])

    def _member(self, bucket_id: int, ranks: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        if self._rows is None:
            self._rows = map_order(self._path)
        return np.asarray(self._rows[self._first_row[bucket_id] + ranks], np.int64)

    def _locate(self, batch: int) -> tuple[int, int]:
        bucket_id = int(np.searchsorted(self._first_batch, batch, side="right")) - 1
        return bucket_id, batch - int(self._first_batch[bucket_id])

    def batch(self, step: int) -> tuple[int, int, Int64[np.ndarray, "B"]]:
        """Epoch, bucket id and rows of the split for any step ≥ 0; the last batch of a bucket repeats its first rows."""
        if step < 0:
            raise ValueError(f"step {step}: must be 0 or more")
        epoch, slot = divmod(step, self.num_batches)
        shuffled = permute(np.array([slot]), self.num_batches, fold_key(self.seed, epoch, 0))
        bucket_id, number = self._locate(int(shuffled[0]))
        bucket = self.buckets[bucket_id]
        places = (number * bucket.batch_size + np.arange(bucket.batch_size)) % bucket.num_utterances
        ranks = permute(places, bucket.num_utterances, fold_key(self.seed, epoch, 1 + bucket_id))
        return epoch, bucket_id, self._member(bucket_id, ranks)

    def evaluation_batch(self, index: int) -> tuple[int, Int64[np.ndarray, "B"], Bool[np.ndarray, "B"]]:
        """Bucket id, rows and row mask of one of the `num_batches` batches that show every utterance once, in order.

        The last batch of a bucket is filled up with its last row, masked out.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"evaluation batch {index} of {self.num_batches}")
        bucket_id, number = self._locate(index)
        bucket = self.buckets[bucket_id]
        ranks = number * bucket.batch_size + np.arange(bucket.batch_size)
        row_mask = ranks < bucket.num_utterances
        return bucket_id, self._member(bucket_id, np.minimum(ranks, bucket.num_utterances - 1)), row_mask

    def evaluation_batches(self) -> Iterator[tuple[int, Int64[np.ndarray, "B"], Bool[np.ndarray, "B"]]]:
        """All evaluation batches, bucket by bucket."""
        return (self.evaluation_batch(index) for index in range(self.num_batches))

    def table(self) -> str:
        """The plan for people: a line per bucket, then what is used, padded and left out."""
        lines = ["bucket  seconds  text  batch  utterances  batches"]
        for i, bucket in enumerate(self.buckets):
            seconds = bucket.num_samples / self.rate_hz
            lines.append(
                f"{i:6d} {seconds:8.2f} {bucket.num_text:5d} {bucket.batch_size:6d}"
                f" {bucket.num_utterances:11d} {bucket.num_batches:8d}"
            )
        stats = self.stats
        lines.append(
            f"{stats.num_utterances} utterances, {stats.num_samples / self.rate_hz / 3600:.2f} h,"
            f" {stats.padding_share:.1%} padding, {stats.num_repeated} rows repeated in an epoch; {stats.left_out}"
        )
        return "\n".join(lines)


def make_plan(
    num_samples: Integer[np.ndarray, "N"],
    text_lengths: Integer[np.ndarray, "N"],
    *,
    rate_hz: int,
    seed: int,
    batch_seconds: float,
    batch_multiple: int,
    num_buckets: int,
    min_seconds: float,
    max_seconds: float = 30.0,
    max_characters_per_second: float = 50.0,
    require_text: bool,
    cache_dir: str | os.PathLike[str] | None = None,
    name: str = "",
) -> Plan:
    """Plans buckets and order from the length columns of a split (memory-mapped, of any size; two passes in chunks).

    `text_lengths` are the most text tokens a row can encode to, 0 without text; rows with more than
    `max_characters_per_second` of them are left out (audio under 1 s counts as 1 s). The order file goes to `cache_dir`
    (which must be on this host, and is the caller's to clean), or to a directory of this user under TMPDIR, where equal
    plans share one file. Raises UserError (which says `name`, that of the split) where no utterance is left, where the
    rate has no whole number of samples in 40 ms, and where the file cannot be written.
    """
    if len(num_samples) != len(text_lengths):
        raise ValueError(f"{len(num_samples)} lengths but {len(text_lengths)} text lengths")
    if not 1 <= num_buckets < LEFT_OUT or batch_multiple < 1:
        raise UserError(
            f"{num_buckets} buckets of batches in multiples of {batch_multiple}: give 1 to 254, and 1 or more"
        )
    if rate_hz % SPEECH_TOKENS_PER_SECOND:
        raise UserError(
            f"a rate of {rate_hz} Hz has no whole number of samples in 40 ms; prepare the corpus at another"
        )
    columns = LengthColumns(
        num_samples,
        text_lengths,
        rate_hz=rate_hz,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        max_characters_per_second=max_characters_per_second,
        require_text=require_text,
    )
    survey = survey_lengths(columns)
    if not survey.num_utterances.sum():
        raise UserError(_nothing_left(name, len(num_samples), survey.left_out, min_seconds, max_seconds))
    buckets = make_buckets(
        survey.num_utterances,
        survey.max_text,
        bin_samples=columns.bin_samples,
        batch_samples=round(batch_seconds * rate_hz),
        batch_multiple=batch_multiple,
        num_buckets=num_buckets,
    )
    ends = np.array([bucket.num_samples // columns.bin_samples for bucket in buckets])
    bucket_of_bin = np.searchsorted(ends, np.arange(len(survey.num_utterances))).astype(np.uint8)
    bucket_of_bin[0] = LEFT_OUT
    digest = hashlib.sha256(f"1 {seed} {rate_hz} {buckets}".encode())
    path, rows = shared_order(columns, bucket_of_bin, buckets, digest, cache_dir)
    num_utterances = sum(bucket.num_utterances for bucket in buckets)
    stats = PlanStats(
        num_utterances=num_utterances,
        left_out=survey.left_out,
        num_repeated=sum(bucket.num_batches * bucket.batch_size for bucket in buckets) - num_utterances,
        num_samples=survey.num_samples,
        num_padded_samples=sum(bucket.num_utterances * bucket.num_samples for bucket in buckets),
    )
    return Plan(
        rate_hz=rate_hz, seed=seed, buckets=buckets, stats=stats, digest=digest.hexdigest(), path=path, rows=rows
    )


def _nothing_left(name: str, num_rows: int, left_out: LeftOut, min_seconds: float, max_seconds: float) -> str:
    mends = [
        (left_out.num_too_short, f"lower data.min_seconds={min_seconds:g}"),
        (left_out.num_too_long, f"raise data.max_seconds={max_seconds:g}"),
        (left_out.num_without_text, "prepare it with transcripts"),
        (left_out.num_with_too_much_text, "check its texts, or raise data.max_characters_per_second"),
        (not num_rows, "prepare a corpus whose split has some"),
    ]
    split = f"split {name}: " if name else ""
    mend = " or ".join(text for applies, text in mends if applies)
    return f"{split}no utterance of {num_rows} is left to plan ({left_out}): {mend}"
