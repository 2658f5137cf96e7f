"""Length buckets: the few static batch shapes that waste the least computation on a given histogram of lengths."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64, Int64

_MAX_EDGES = 1000  # the search costs edges² per bucket; more candidate lengths than this are thinned out
_TEXT_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """One static batch shape and how many utterances it serves."""

    num_samples: int  # waveform samples of a row
    num_text: int  # text tokens of a row
    batch_size: int  # rows of the global batch
    num_utterances: int

    @property
    def num_batches(self) -> int:
        """Batches that show each utterance once, the last one filled up."""
        return -(-self.num_utterances // self.batch_size)


def make_buckets(
    num_utterances: Int64[np.ndarray, "bins"],
    max_text: Int64[np.ndarray, "bins"],
    *,
    bin_samples: int,
    batch_samples: int,
    batch_multiple: int,
    num_buckets: int,
) -> tuple[Bucket, ...]:
    """At most `num_buckets` buckets that minimise the samples computed in an epoch, padding and filled rows included.

    Bin i counts the utterances of more than (i-1) and at most i times `bin_samples` samples, and their longest text.
    A bucket ends at a bin; its batch is as many rows as `batch_samples` holds, rounded down to `batch_multiple`. No
    bucket has fewer utterances than its batch: where none can have that many, one bucket takes everything and its
    batch shrinks to the utterances, rounded up to `batch_multiple`.
    """
    filled = np.flatnonzero(num_utterances)
    stride = -(-len(filled) // _MAX_EDGES)
    edges = np.concatenate([[0], filled[::-1][::stride][::-1]])
    batch_sizes = batch_samples // np.maximum(edges * bin_samples, 1) // batch_multiple * batch_multiple
    batch_sizes = np.maximum(batch_sizes, batch_multiple)
    below = np.cumsum(num_utterances)[edges]
    ends = _best_ends(_epoch_cost(edges, below, batch_sizes), num_buckets)
    buckets = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        count = int(below[end] - below[start])
        longest_text = int(max_text[edges[start] + 1 : edges[end] + 1].max())
        buckets.append(
            Bucket(
                num_samples=int(edges[end]) * bin_samples,
                num_text=max(1, -(-longest_text // _TEXT_MULTIPLE)) * _TEXT_MULTIPLE,
                batch_size=min(int(batch_sizes[end]), -(-count // batch_multiple) * batch_multiple),
                num_utterances=count,
            )
        )
    return tuple(buckets)


def _epoch_cost(
    edges: Int64[np.ndarray, "E"], below: Int64[np.ndarray, "E"], batch_sizes: Int64[np.ndarray, "E"]
) -> Float64[np.ndarray, "E E"]:
    """Bins computed in an epoch by a bucket from edge i (exclusive) to edge j; infinite where it is no bucket."""
    counts = below[None, :] - below[:, None]
    rows = -(-counts // batch_sizes[None, :]) * batch_sizes[None, :]
    allowed: Bool[np.ndarray, "E E"] = np.triu(counts >= batch_sizes[None, :], k=1)
    return np.where(allowed, (rows * edges[None, :]).astype(np.float64), np.inf)


def _best_ends(cost: Float64[np.ndarray, "E E"], num_buckets: int) -> list[int]:
    """Dynamic programming over the right ends; the fewest buckets among equally good choices."""
    last = len(cost) - 1
    best, parents, totals = cost[0], [np.zeros(last + 1, np.int64)], [cost[0, last]]
    for _ in range(1, min(num_buckets, last)):
        through = best[:, None] + cost
        parents.append(through.argmin(axis=0))
        best = through.min(axis=0)
        totals.append(best[last])
    if not np.isfinite(min(totals)):
        return [last]
    ends = [last]
    for parent in parents[int(np.argmin(totals)) : 0 : -1]:
        ends.append(int(parent[ends[-1]]))
    return ends[::-1]
