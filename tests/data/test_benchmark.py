import pathlib

import numpy as np

from cv2jax.data.benchmark import SilentSplit, benchmark_index, benchmark_loader, synthetic_lengths
from cv2jax.data.plan import make_plan


def encode(text: str) -> np.ndarray:
    return np.ones(len(text), np.int32)


def test_loader_report_counts_what_was_loaded(tmp_path: pathlib.Path) -> None:
    columns = synthetic_lengths(300, 0, tmp_path, rate_hz=8000)
    options = {"batch_seconds": 40.0, "batch_multiple": 2, "num_buckets": 1, "min_seconds": 0.0, "max_seconds": 120.0}
    plan = make_plan(*columns, rate_hz=8000, seed=0, require_text=False, **options)
    split = SilentSplit(*columns, 8000)
    report = benchmark_loader(split, plan, encode, num_batches=4, num_workers=0, num_threads=1, prefetch=1)
    assert report.num_utterances == 4 * plan.buckets[0].batch_size
    assert report.seconds > 0
    assert report.speech_seconds > 0
    assert f"{report.utterances_per_second:.1f} utterances/s" in str(report)
    assert report.utterances_per_second_per_worker == report.utterances_per_second


def test_synthetic_lengths_are_lognormal_and_repeatable(tmp_path: pathlib.Path) -> None:
    samples, characters = synthetic_lengths(20_000, 5, tmp_path)
    assert isinstance(samples, np.memmap)
    assert samples.dtype == characters.dtype == np.int32
    logarithm = np.log(samples / 24000)
    assert abs(logarithm.mean() - np.log(6)) < 0.02
    assert abs(logarithm.std() - 0.7) < 0.02
    (tmp_path / "again").mkdir()
    np.testing.assert_array_equal(synthetic_lengths(20_000, 5, tmp_path / "again")[1], characters)


def test_index_report_leaves_no_files(tmp_path: pathlib.Path) -> None:
    report = benchmark_index(20_000, directory=tmp_path)
    assert 0 < report.plan_seconds < report.first_batch_seconds
    assert report.peak_resident_mb > 50
    assert "20000 utterances: plan in" in str(report)
    assert not list(tmp_path.iterdir())
