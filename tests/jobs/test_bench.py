"""`cv2jax bench`: small runs give every figure, the table has its columns, mistakes are one line."""

import importlib.util
import json
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs import bench_lm
from cv2jax.jobs.bench import bench, format_table
from cv2jax.jobs.bench_lm import make_workload, measure_lm_decode, training_batch, training_flops
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.models.text_speech_lm.model import TextSpeechLm, init_params

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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
def test_the_language_model_is_measured_alone(tmp_path: pathlib.Path) -> None:
    report = bench("lm-train", BenchOptions(size="tiny", repeats=2, against=""))
    check(report, {"lm-train"}, 2)
    assert [m["unit"] for m in report["measurements"]] == ["tokens/s", "%", "s a step"]
    tokens, _, seconds = (m["values"] for m in report["measurements"])
    np.testing.assert_allclose(tokens, 128 / np.array(seconds), rtol=0.02)
    figures = measure_lm_decode(BenchOptions(size="tiny", repeats=2, against=""), tmp_path)
    assert [unit for _, unit, _ in figures] == ["ms a token"] * 2
    assert ["batch 1," in case for case, _, _ in figures] == [True, False]


class Slower:
    """Stands in for PyTorch: computes `loss`, and takes its time."""

    def __init__(self, loss: float) -> None:
        self.loss, self.calls = loss, []

    def train_step(self, batch: dict, *, text_head: bool) -> float:
        self.calls.append(text_head)
        time.sleep(0.2 if text_head else 0.1)
        return self.loss


def test_sides_race_in_turn_and_must_agree(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, params, sides = make_workload("tiny", on_cpu=True), {"head_bias": jnp.ones(5)}, Slower(5.0)
    monkeypatch.setattr(bench_lm, "_sides", lambda options, place: (work, params, sides))
    monkeypatch.setattr(bench_lm, "packed_loss", lambda config, params, batch: (jnp.sum(params["head_bias"] ** 2), {}))
    figures = {
        case.rpartition(": ")[2]: values
        for case, _, values in bench_lm.measure_lm_train(BenchOptions(repeats=3), tmp_path)
    }
    assert sides.calls == [True, False] * 4
    official, bare = figures["official"], figures["bare backbone"]
    assert min(official) > 0.19
    assert min(bare) > 0.09
    np.testing.assert_allclose(figures["ours against bare backbone"], np.divide(bare, figures["ours"]))
    sides.loss += 0.1
    with pytest.raises(RuntimeError, match="losses of the two sides differ"):
        bench_lm.measure_lm_train(BenchOptions(repeats=1), tmp_path)


def test_flops_are_those_of_the_matrices() -> None:
    """Against what XLA counts for the forward pass, which does not know that masked keys need no work."""
    work = make_workload("tiny", on_cpu=True)
    batch = training_batch(work)
    c = work.config.backbone
    rows, length = batch["token"].shape
    masked = 4 * c.num_layers * c.width * (rows * length**2 - np.sum(batch["positions"] + 1))
    params = jax.eval_shape(lambda: init_params(work.config, jax.random.key(0)))
    mask = jnp.ones((1, 1, length, length), bool)

    def forward(params, batch):
        return (
            TextSpeechLm(work.config)
            .apply({"params": nn.unbox(params)}, batch["token"], batch["kind"], batch["positions"], mask)
            .logits
        )

    counted = jax.jit(forward).lower(params, jax.device_put(batch)).cost_analysis()["flops"]
    assert training_flops(work, batch["positions"]) / 3 + masked == pytest.approx(counted, rel=0.1)
    assert batch["segments"].max() == 2
    np.testing.assert_array_equal(np.unique(batch["positions"][batch["segments"] == 2]), np.arange(32))


@pytest.mark.official
def test_pytorch_computes_the_same(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    for name in ("lm-train", "lm-decode"):
        report = bench(name, BenchOptions(size="tiny", repeats=2))  # fails where the sides differ
        check(report, {name}, 2)
        assert sum("ours against" in m["case"] for m in report["measurements"]) == (2 if name == "lm-train" else 1)


def test_without_pytorch_a_comparison_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cv2jax\[official\]'.*--against ''"):
        bench("lm-train", BenchOptions(size="tiny"))


def test_mistakes_are_one_line(tmp_path: pathlib.Path) -> None:
    for options, message in (
        ({"size": "huge"}, "tiny or official"),
        ({"repeats": 0}, "at least 1"),
        ({"seconds": -1.0}, "negative"),
        ({"against": "numpy"}, "choose torch"),
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
