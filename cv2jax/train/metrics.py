"""Metrics of a run: JSON lines (the record), TensorBoard events, W&B where asked, and a PNG of curves (the view)."""

import json
import math
import os
import pathlib
import time
from typing import Any

import tensorboardX

from cv2jax.config import UserError
from cv2jax.train.disk import full_disk_reported
from cv2jax.train.wandb_log import WandbLog

# All that may differ between equal runs: times, and what is of the steps since the line before, which a resumed run lacks.
# Seconds are of a step, a mean over those steps; the four parts are all of the loop's time.
PARTS = ("data_seconds", "compute_seconds", "save_seconds", "evaluate_seconds")
TIME_FIELDS = (
    "seconds",  # since the process began to train
    "steps_per_second",  # without saves and evaluations, as what follows
    *PARTS,
    "audio_seconds_per_second",
    "tokens_per_second",
    "utilisation",  # model FLOPs over what the devices could do in the time
    "padding_share",  # of the first process's rows
    "device_memory_gib",  # peak of the fullest device
    "device_memory_share",
)
MAX_POINTS = 2000
NOT_DRAWN = ("step", "batch_hash", "codes_used_share", *(name for name in TIME_FIELDS if name != "steps_per_second"))


class MetricWriter:
    """Appends to `metrics.jsonl` and TensorBoard in `workdir`; what lies after `start_step` is taken back first.

    A killed run may have logged past its last checkpoint; the resumed run computes those steps again, so its record
    must not hold them twice. Only the first process writes.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int, *, enabled: bool = True, wandb: WandbLog | None = None
    ) -> None:
        self._enabled, self._wandb = enabled, wandb
        if not enabled:
            return
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start_step] if start_step else []
        replacement = self._path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        replacement.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._started = time.monotonic()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """One line {"step", "kind", …values}; numbers go to TensorBoard as `kind/name` too."""
        if not self._enabled:
            return
        line = {"step": step, "kind": kind, **{k: _plain(v) for k, v in values.items()}}
        line["seconds"] = round(time.monotonic() - self._started, 3)
        with full_disk_reported(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and value is not None:
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.write(step, kind, line)

    def sync(self) -> None:
        """Waits until the disk has the lines: a checkpoint is about to count on them."""
        if self._enabled:
            with full_disk_reported(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes all."""
        if self._enabled:
            self._file.close()
            self._events.close()
            if self._wandb is not None:
                self._wandb.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out, any other bad line is a UserError."""
    if not path.is_file():
        return []
    texts = path.read_bytes().splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text.decode("utf-8"))
        except ValueError:  # not JSON, or not UTF-8
            if number == len(texts):
                break
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int) or "kind" not in line:
            raise UserError(f"{path}:{number}: not a metrics line; remove that line and give the same command")
        lines.append(line)
    return lines


def draw_curves(metrics: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """A PNG with one panel a metric: training series as lines, held-out series with marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in NOT_DRAWN and not name.startswith("num_"):  # counts are no curves either
                steps, values = series.setdefault(f"{line['kind']} {name}", ([], []))
                steps.append(line["step"])
                values.append(value)
    if not series:
        return
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, (steps, values)) in enumerate(sorted(series.items())):
        axes = figure.add_subplot(rows, columns, i + 1)
        stride = max(1, len(steps) // MAX_POINTS)
        axes.plot(steps[::stride], values[::stride], marker="." if name.startswith("evaluate") else None, linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _plain(value: Any) -> Any:
    """A JSON value; numbers that are not finite become null, because JSON has none."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
