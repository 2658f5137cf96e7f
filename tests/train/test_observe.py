"""What a run tells of itself while it trains: where time goes, utilisation, slow loading, traces, W&B."""

import os
import signal
import sys
import time
import types

import pytest

from cv2jax.config import UserError
from cv2jax.data.loader import faster_loading
from cv2jax.train import recorder
from cv2jax.train.loop import train
from cv2jax.train.metrics import PARTS, TIME_FIELDS, read_metrics
from cv2jax.train.trace import parse_steps
from tests.train.toy import SHAPES, ToyTask, toy_config


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """They are drawn elsewhere, and take longer than the run."""
    monkeypatch.setattr(recorder, "draw_curves", lambda *arguments: None)


def run(workdir, config=None, *, on_step=None, **options):
    config = config or toy_config(num_steps=9)
    assert train(ToyTask(config, on_step=on_step), config, workdir, **options) == 0
    return [x for x in read_metrics(workdir / "metrics.jsonl") if x["kind"] == "train"]


def test_a_line_says_where_the_time_went(tmp_path):
    lines = run(tmp_path, on_step=lambda step: time.sleep(0.05))
    for line in lines:
        assert set(PARTS) <= set(line)
        busy = line["data_seconds"] + line["compute_seconds"]
        assert line["steps_per_second"] == pytest.approx(1 / busy, rel=0.05)
        assert line["padding_share"] == 0.25
        assert line["tokens_per_second"] > 0
        assert "utilisation" not in line
        assert set(line) - set(TIME_FIELDS) == {
            "step", "kind", "loss", "grad_norm", "num_skipped", "batch_hash"
        }  # fmt: skip
    assert lines[1]["save_seconds"] > 0  # of step 4
    assert lines[1]["evaluate_seconds"] > 0  # of step 5
    assert sum(line["data_seconds"] for line in lines) > 0


def test_utilisation_is_model_flops_over_peak(tmp_path):
    asked = []

    def count_flops(step, state, batch, key):
        asked.append(batch["x"].shape)
        return 1e6 * batch["x"].shape[1]

    lines = run(tmp_path, count_flops=count_flops, peak_flops=1e6)
    assert asked == [(8, n) for n in SHAPES]
    for line in lines:
        steps_per_second = line["steps_per_second"]
        assert 4 * steps_per_second / 8 * 0.9 < line["utilisation"] < 6 * steps_per_second / 8 * 1.1  # 8 devices


def test_device_memory_is_that_of_the_fullest(tmp_path, monkeypatch):
    def device(peak):
        return types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak, "bytes_limit": 4 << 30})

    monkeypatch.setattr(recorder.jax, "local_devices", lambda: [device(1 << 30), device(3 << 30)])
    assert recorder._device_memory() == {"device_memory_gib": 3.0, "device_memory_share": 0.75}


def test_a_slow_loader_is_named_once_in_a_while(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(recorder, "SLOW_SHARE", 0.0)
    run(tmp_path / "slow", on_step=lambda step: time.sleep(0.05))
    (line,) = [r.getMessage() for r in caplog.records if "waits for data" in r.getMessage()]
    assert "(process 0 of 1)" in line
    assert "data.num_workers" in line
    caplog.clear()
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_WARNINGS", 0.0)
    run(tmp_path / "often", on_step=lambda step: time.sleep(0.05))
    assert len([r for r in caplog.records if "waits for data" in r.getMessage()]) > 1


def test_what_to_change_hangs_on_how_data_is_read():
    data = toy_config().data
    assert "num_threads" in faster_loading(data)
    workers = type(data)(num_workers=3)
    assert "raise data.num_workers (now 3)" in faster_loading(workers)


def test_the_named_steps_and_those_after_sigusr1_are_traced(tmp_path, caplog):
    def ask(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    with caplog.at_level("INFO"):
        run(tmp_path, toy_config(num_steps=9, profile_steps="2:4"), on_step=ask)
    assert f"profiler trace of steps 2 to 3 is in {tmp_path / 'profile'}; open it with" in caplog.text
    assert "profiler trace of steps 7 to 9 is in" in caplog.text  # where the run ends
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_that_cannot_be_taken_ends_nothing(tmp_path, caplog, monkeypatch):
    def fail(place):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    run(tmp_path, toy_config(num_steps=6, profile_steps="2:4"))
    assert "no profiler trace (Only one profile" in caplog.text


@pytest.mark.parametrize("text", ["5", "5:5", "0:3", "7:2", "a:b", "1:2:3"])
def test_steps_that_are_none_are_refused_before_anything_is_made(tmp_path, text):
    with pytest.raises(UserError, match=r"profile_steps=.*: give first:end"):
        run(tmp_path / "w", toy_config(profile_steps=text))
    assert not (tmp_path / "w").exists()
    assert parse_steps("3:5") == range(3, 5)


class FakeWandb(types.ModuleType):
    """Notes what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_has_the_numbers_and_one_run_over_a_resume(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tmp_path, toy_config(num_steps=6, wandb="project"))
    monkeypatch.setenv("CV2JAX_WANDB", "project")
    run(tmp_path / "other", toy_config(num_steps=6))
    first, other = wandb.inits
    assert (first["project"], first["name"], first["config"]["num_steps"]) == ("project", "toy", 6)
    assert first["id"] == (tmp_path / "wandb_id").read_text() != other["id"]
    assert wandb.finished == 2
    assert {"step", "train/loss", "train/data_seconds"} <= set(wandb.logged[0])


def test_wandb_that_is_not_there_or_refuses_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"wandb=p: the package wandb is not installed; pip install wandb"):
        run(tmp_path, toy_config(wandb="p"))
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(
        wandb, "init", lambda **options: (_ for _ in ()).throw(RuntimeError("api_key not configured\nx"))
    )
    with pytest.raises(UserError, match=r"^wandb=p: api_key not configured; mend that, or leave it empty$"):
        run(tmp_path, toy_config(wandb="p"))
