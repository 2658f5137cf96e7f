"""`cv2jax bench`: small runs give every figure, the table has its columns, mistakes are one line."""

import json
import pathlib

import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs.bench import bench, format_table
from cv2jax.jobs.bench_options import BenchOptions

MEASUREMENT_KEYS = {"bench", "case", "unit", "values", "median", "peak_memory_mb", "device_memory_mb"}


def check(report: dict, benches: set[str], repeats: int) -> None:
    """Every figure is positive and complete, and has a row in the table."""
    assert {m["bench"] for m in report["measurements"]} == benches
    table = format_table(report).splitlines()
    assert table[2].startswith("| bench | case | median | unit | range | peak memory MB |")
    assert len(table) == 4 + len(report["measurements"])
    for m, row in zip(report["measurements"], table[4:], strict=True):
        assert set(m) == MEASUREMENT_KEYS
        assert min(m["values"]) > 0
        assert m["median"] == pytest.approx(float(np.median(m["values"])))
        assert len(m["values"]) in (1, repeats)
        assert 20 < m["peak_memory_mb"] < 20_000
        assert row.split(" | ")[1] == m["case"]
        assert row.count("|") == 8
    assert {"processor", "cores", "devices", "jax", "python"} <= set(report["machine"])


def test_loader_reports_each_worker_and_the_synthetic_index(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    flags = ["--seconds", "80", "--repeats", "1", "--utterances", "20000", "--out", str(out)]
    assert run_cli(["bench", "loader", *flags]) == 0
    report = json.loads(out.read_text())
    check(report, {"loader"}, 1)
    assert capsys.readouterr().out.strip() == format_table(report)
    cases = [m["case"] for m in report["measurements"]]
    assert [sum(word in case for case in cases) for word in ("main process", "worker processes", "20,000")] == [1, 2, 3]
    assert {m["unit"] for m in report["measurements"]} == {"utterances/s per worker", "s", "MB"}


def test_prepare_and_encode_report_real_time() -> None:
    report = bench("prepare", BenchOptions(seconds=40.0, repeats=2))
    check(report, {"prepare"}, 2)
    per_core, all_cores = report["measurements"]
    assert "per core" in per_core["case"]
    assert all_cores["median"] >= per_core["median"]
    report = bench("encode", BenchOptions(seconds=20.0, repeats=2, size="tiny"))
    check(report, {"encode"}, 2)
    assert {m["unit"] for m in report["measurements"]} == {"x realtime"}
    assert "tiny" in report["measurements"][0]["case"]


@pytest.mark.full
def test_train_reports_steps() -> None:
    report = bench("train", BenchOptions(seconds=80.0, repeats=2))
    check(report, {"train"}, 2)
    assert [m["unit"] for m in report["measurements"]] == ["steps/s", "utterances/s", "x realtime"]


def test_mistakes_are_one_line(tmp_path: pathlib.Path) -> None:
    for options, message in (
        ({"size": "huge"}, "tiny or official"),
        ({"repeats": 0}, "at least 1"),
        ({"seconds": -1.0}, "negative"),
        ({"manifest": str(tmp_path / "none.jsonl")}, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            bench("prepare", BenchOptions(**options))
    with pytest.raises(UserError, match="no benchmark"):
        bench("everything", BenchOptions())
    with pytest.raises(UserError, match="directory"):
        bench("prepare", BenchOptions(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*cannot write there .*give another file"):
        bench("prepare", BenchOptions(), tmp_path / "file" / "bench.json")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="bench prepare failed"):
        bench("prepare", BenchOptions(manifest=str(tmp_path / "empty.jsonl")))
    assert run_cli(["bench"]) == 2
