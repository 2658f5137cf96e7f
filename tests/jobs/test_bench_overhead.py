"""`cv2jax bench overhead`: pairs take turns, and every figure is there."""

import pytest

from cv2jax.jobs.bench import bench
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_overhead import _pairs


def test_pairs_take_turns_and_are_compared_one_by_one():
    order = []
    full, bare = iter([1.1, 2.4, 0.9]), iter([1.0, 2.0, 1.0])
    percents = _pairs(lambda: order.append("with") or next(full), lambda: order.append("without") or next(bare), 3)
    assert percents == pytest.approx([10.0, 20.0, -10.0])
    assert order == ["with", "without", "without", "with", "with", "without"]


@pytest.mark.full
def test_every_figure_is_there():
    report = bench("overhead", BenchOptions(seconds=80.0, repeats=2))
    figures = {m["case"].partition(": ")[2].split()[0]: m for m in report["measurements"]}
    assert set(figures) == {"async", "a", "logging,", "time"}
    assert all(len(m["values"]) == 2 for m in figures.values())
    assert min(figures["a"]["values"]) > 0
    assert 0 < min(figures["time"]["values"]) < 100
