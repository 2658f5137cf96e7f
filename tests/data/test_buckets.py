import itertools

import numpy as np
import pytest

from cv2jax.data.buckets import Bucket, make_buckets


def cost(buckets: tuple[Bucket, ...]) -> int:
    return sum(bucket.num_batches * bucket.batch_size * bucket.num_samples for bucket in buckets)


def brute_force(counts: np.ndarray, batch_bins: int, multiple: int, num_buckets: int) -> float:
    filled = np.flatnonzero(counts).tolist()
    best = np.inf
    for size in range(1, num_buckets + 1):
        for inner in itertools.combinations(filled[:-1], size - 1):
            total, start = 0.0, 0
            for end in (*inner, filled[-1]):
                rows = max(multiple, batch_bins // end // multiple * multiple)
                n = int(counts[start + 1 : end + 1].sum())
                total += -(-n // rows) * rows * end if n >= rows else np.inf
                start = end
            best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4])
def test_no_other_buckets_compute_less(seed: int, num_buckets: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 40, 13)
    counts[0] = 0
    buckets = make_buckets(
        counts, counts * 0, bin_samples=10, batch_samples=600, batch_multiple=2, num_buckets=num_buckets
    )
    assert len(buckets) <= num_buckets
    assert cost(buckets) == 10 * brute_force(counts, 60, 2, num_buckets)
    assert sum(bucket.num_utterances for bucket in buckets) == counts.sum()
    assert all(bucket.num_utterances >= bucket.batch_size for bucket in buckets)


def test_shapes_follow_the_rules() -> None:
    counts, text = np.zeros(101, np.int64), np.zeros(101, np.int64)
    counts[[10, 100]] = 1000
    text[[9, 10, 100]] = 16, 17, 0
    short, long = make_buckets(
        counts, text, bin_samples=640, batch_samples=64_000 * 5 + 1, batch_multiple=8, num_buckets=5
    )
    # 320001 samples hold 50 rows of 6400, that is 48 in eights; the long ones get the least batch, one multiple.
    assert short == Bucket(num_samples=6400, num_text=24, batch_size=48, num_utterances=1000)
    assert long == Bucket(num_samples=64_000, num_text=8, batch_size=8, num_utterances=1000)
    assert short.num_batches == 21


def test_a_bucket_too_small_for_its_batch_joins_another() -> None:
    counts = np.zeros(21, np.int64)
    counts[[10, 20]] = 3, 50
    (bucket,) = make_buckets(counts, counts, bin_samples=1, batch_samples=80, batch_multiple=4, num_buckets=4)
    assert (bucket.num_samples, bucket.num_utterances) == (20, 53)


def test_fewer_utterances_than_any_batch_make_one_small_batch() -> None:
    counts = np.zeros(21, np.int64)
    counts[[10, 20]] = 3, 2
    (bucket,) = make_buckets(counts, counts, bin_samples=1, batch_samples=1000, batch_multiple=4, num_buckets=4)
    assert (bucket.batch_size, bucket.num_utterances, bucket.num_batches) == (8, 5, 1)


def test_more_lengths_than_the_search_takes_are_thinned() -> None:
    counts = np.ones(5001, np.int64)
    counts[0] = 0
    buckets = make_buckets(counts, counts, bin_samples=1, batch_samples=50_000, batch_multiple=8, num_buckets=6)
    assert buckets[-1].num_samples == 5000
    assert sum(bucket.num_utterances for bucket in buckets) == 5000
    assert len(buckets) == 6
