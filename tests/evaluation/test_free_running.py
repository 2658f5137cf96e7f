"""Free-running metrics against plain counting, and means of a set from those of its batches."""

import itertools

import numpy as np
import pytest

from cv2jax.evaluation.free_running import free_running_metrics, mean_metrics


def measure(generated, references, statuses=None):
    arrays = [[np.array(row, np.int32) for row in rows] for rows in (generated, references)]
    return free_running_metrics(arrays[0], statuses or ["ok"] * len(generated), arrays[1])


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_plain_counting(seed):
    rng = np.random.default_rng(seed)
    generated, references = ([rng.integers(0, 3, rng.integers(low, 30)).tolist() for _ in range(25)] for low in (0, 1))
    statuses = rng.choice(["ok", "hit_limit", "non_finite"], 25).tolist()
    metrics = measure(generated, references, statuses)
    errors = [abs(len(g) - len(r)) / len(r) for g, r in zip(generated, references, strict=True)]
    assert metrics["length_error"] == pytest.approx(sum(errors) / 25)
    assert metrics["length_close"] == sum(e <= 0.25 for e in errors) / 25
    for name, rows in (("repetition_rate", generated), ("reference_repetition_rate", references)):
        pairs = [pair for row in rows for pair in itertools.pairwise(row)]
        assert metrics[name] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert metrics["longest_run"] == max(len(list(run)) for row in generated for _, run in itertools.groupby(row))
    for status in ("hit_limit", "non_finite"):
        assert metrics[status] == statuses.count(status)


def test_what_was_said_well():
    rows = [[1, 1, 2, 3], [4, 5, 5, 5, 6, 7, 8]]
    metrics = measure(rows, rows)
    assert (metrics["length_error"], metrics["length_close"]) == (0, 1)
    assert metrics["repetition_rate"] == metrics["reference_repetition_rate"] == 3 / 9
    assert metrics["longest_run"] == 3
    assert metrics["hit_limit"] == metrics["non_finite"] == 0


def test_a_quarter_more_or_less_is_close():
    lengths = (74, 75, 125, 126)
    metrics = measure([[0] * length for length in lengths], [[0] * 100] * 4)
    assert metrics["length_close"] == 0.5
    assert metrics["length_error"] == pytest.approx((0.26 + 0.25 + 0.25 + 0.26) / 4)


def test_silence_is_counted_not_divided_by():
    metrics = measure([[], []], [[1, 2], []])
    assert (metrics["length_error"], metrics["length_close"]) == (1, 0)
    assert (metrics["longest_run"], metrics["repetition_rate"]) == (0, 0)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("lengths", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (0, 0, 0)])
def test_numbers_that_do_not_match_are_refused(lengths):
    one = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=f"{lengths[0]} results and {lengths[1]} statuses for {lengths[2]} references"):
        free_running_metrics([one] * lengths[0], ["ok"] * lengths[1], [one] * lengths[2])


@pytest.mark.parametrize("seed", range(3))
def test_means_of_a_set_are_those_over_its_targets(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, 5)
    loss, ends = [rng.normal(size=n) for n in sizes], [rng.random(n // 3) for n in sizes]

    def mean(values):
        return np.float32(values.mean() if len(values) else 0)

    batches = [
        {
            "loss": mean(loss[i]),
            "eos_probability_at_eos": mean(ends[i]),
            "num_targets": np.int32(n),
            "num_eos": np.int32(n // 3),
            "expected_eos": np.float32(0.5 + i),
            "row_finite": np.ones(2, bool),
        }
        for i, n in enumerate(sizes)
    ]
    metrics = mean_metrics(batches)
    assert metrics.keys() == batches[0].keys() - {"row_finite"}
    assert metrics["loss"] == pytest.approx(np.concatenate(loss).mean(), rel=1e-5)
    assert metrics["eos_probability_at_eos"] == pytest.approx(np.concatenate(ends).mean(), rel=1e-5)
    counts = (sum(sizes), sum(sizes // 3), sum(0.5 + i for i in range(5)))
    assert (metrics["num_targets"], metrics["num_eos"], metrics["expected_eos"]) == counts
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_batch_without_targets_weighs_nothing_and_nothing_has_mean_0():
    fields = {"expected_eos": 0.0, "num_eos": 0, "eos_probability_at_eos": 0.0}
    empty, full = ({"loss": loss, "num_targets": n, **fields} for loss, n in ((0.0, 0), (2.0, 3)))
    assert mean_metrics([empty, full, empty])["loss"] == 2
    assert mean_metrics([empty])["loss"] == 0
    assert np.isnan(mean_metrics([full, full | {"loss": np.nan}])["loss"])  # a broken model shows
