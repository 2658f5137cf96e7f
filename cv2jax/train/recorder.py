"""What a run writes down while it trains: metrics with where the time went, the audit, curves, progress, warnings."""

import contextlib
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from cv2jax.config import TrainConfig, UserError
from cv2jax.data.loader import faster_loading
from cv2jax.train.audit import AuditLog
from cv2jax.train.clock import Clock
from cv2jax.train.metrics import MetricWriter, draw_curves, read_metrics
from cv2jax.train.task import Task
from cv2jax.train.wandb_log import WandbLog

SECONDS_BETWEEN_DRAWINGS = 60
MAX_SKIPPED_IN_A_ROW = 50
SLOW_SHARE = 0.2  # of the time without saves and evaluations that waits for data: the loader is slow
SLOW_SECONDS = 30.0  # of training, to judge by
SECONDS_BETWEEN_WARNINGS = 300


class Recorder:
    """Writes what happened; the first process alone, but for what must stop or warn on all of them.

    Args:
      peak_flops: of all devices of the run, each second; 0 if not known, then there is no utilisation.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        workdir: pathlib.Path,
        start: int,
        clock: Clock,
        *,
        enabled: bool,
        wandb: str = "",
        peak_flops: float = 0.0,
    ) -> None:
        self._task, self._config, self._workdir, self._enabled = task, config, workdir, enabled
        self._clock, self._peak_flops = clock, peak_flops
        sink = WandbLog(wandb, workdir, config) if enabled and wandb else None
        self._writer = MetricWriter(workdir, start, enabled=enabled, wandb=sink)
        self._audit = AuditLog(workdir, start) if enabled else None
        self._interactive = enabled and sys.stderr.isatty()
        total = config.num_steps
        self._progress = tqdm(total=total, initial=start, desc=config.name, unit="step", disable=not self._interactive)
        self._drawn = float("-inf")
        self._line_step, self._skipped_in_a_row = start, 0
        self._contents: list[Any] = []  # of the steps that are not recorded yet
        self._since_line = _Sums()
        self._judged = {"data": 0.0, "step": 0.0}
        self._warned = float("-inf")

    def __enter__(self) -> "Recorder":
        self._clock.take()
        return self

    def __exit__(self, *unused: object) -> None:
        self._writer.close()
        if self._audit is not None:
            self._audit.close()
        self._progress.close()

    def has_evaluated(self, step: int) -> bool:
        """Whether the record holds the evaluation of a step."""
        return any(x["step"] == step and x["kind"] == "evaluate" for x in read_metrics(self._workdir / "metrics.jsonl"))

    def started(self, step: int, batch_size: int, local: Mapping[str, np.ndarray], flops: float) -> None:
        """A step was handed to the devices, with this process's rows of a batch of `batch_size`."""
        if self._enabled:
            content = self._task.content(step - 1, dict(local))
            self._contents.append(content)
            self._since_line.add(content, batch_size / max(len(next(iter(local.values()))), 1), flops)

    def record(self, step: int, window: list[dict[str, np.ndarray]], *, line: bool, saving: bool) -> None:
        """The steps up to `step`, metrics fetched: audits them, traces skipped ones and, if `line`, logs the last one's values.

        With `saving`, what is written is on the disk when this returns. Raises UserError when nothing but skipped steps came
        for a while: training on would only look like training.
        """
        first = step - len(window) + 1
        for which, metrics in enumerate(window, start=first):
            if self._audit is not None:
                self._audit.write(which, self._contents[which - first], metrics)
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped"] else 0
            if metrics["skipped"]:
                self._record_skipped(which, metrics)
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"{self._skipped_in_a_row} steps in a row up to step {which} had no finite loss or gradient; "
                    "lower optimizer.learning_rate or set compute_dtype=float32 and give the same command in a new --workdir"
                )
        self._contents = []
        self._progress.update(len(window))
        if line:
            self._record_line(step, window[-1])
        if saving:
            self._writer.sync()
        if self._audit is not None:
            self._audit.flush(sync=saving)

    def _record_line(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        seconds, steps = self._clock.take(), step - self._line_step
        busy = seconds.get("data", 0.0) + seconds.get("step", 0.0)
        self._warn_of_slow_loading(step, seconds)
        if self._enabled:
            values = {k: v for k, v in metrics.items() if np.ndim(v) == 0 and k != "skipped"}
            times = _times(seconds, steps) | self._since_line.rates(busy, self._peak_flops) | _device_memory()
            self._writer.write(step, "train", {**values, **times})
            loss, rate = float(values["loss"]), times["steps_per_second"]
            self._progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if not self._interactive:
                waits = seconds.get("data", 0.0) / max(busy, 1e-9)
                speed = ", ".join(f"{times[k]:.4g} {w}" for k, w in _SHOWN.items() if k in times)
                logging.info(
                    "step %d: loss %.4f, %.2f steps/s, %s, %.0f %% data wait", step, loss, rate, speed, 100 * waits
                )
        self._since_line, self._line_step = _Sums(), step

    def record_evaluation(self, step: int, values: dict[str, Any], *, draw: bool) -> None:
        """Held-out metrics; the curves are drawn now and then, and whenever `draw` asks."""
        self._writer.write(step, "evaluate", values)
        if not self._enabled:
            return
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float))
        logging.info("held out at step %d: %s", step, shown)
        if draw or time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            draw_curves(read_metrics(self._workdir / "metrics.jsonl"), self._workdir / "curves.png", self._config.name)
            self._drawn = time.monotonic()

    def _record_skipped(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Names the utterances whose rows were not finite, all of the batch's if it was the gradient."""
        ids = self._task.utterance_ids(step - 1)
        finite = metrics.get("row_finite")
        named = ids if finite is None or finite.all() else [i for i, ok in zip(ids, finite, strict=True) if not ok]
        self._writer.write(step, "skipped", {"skipped_utterances": named, "loss": metrics["loss"]})
        logging.warning("step %d was skipped: loss or gradient not finite; utterances %s", step, ", ".join(named[:8]))

    def _warn_of_slow_loading(self, step: int, seconds: dict[str, float]) -> None:
        """Every process of its own loader: one slow host holds all of them up, and the others only see slow steps."""
        for name in self._judged:
            self._judged[name] += seconds.get(name, 0.0)
        busy = sum(self._judged.values())
        if busy < SLOW_SECONDS:
            return
        share = self._judged["data"] / busy
        self._judged = dict.fromkeys(self._judged, 0.0)
        if share > SLOW_SHARE and time.monotonic() - self._warned > SECONDS_BETWEEN_WARNINGS:
            self._warned = time.monotonic()
            who = f"host {socket.gethostname()} (process {jax.process_index()} of {jax.process_count()})"
            mend = faster_loading(self._config.data)
            logging.warning("step %d: %s waits for data %.0f %% of its time; %s", step, who, 100 * share, mend)


_SHOWN = {"audio_seconds_per_second": "x realtime", "tokens_per_second": "tokens/s", "utilisation": "utilisation"}


class _Sums:
    """What the steps since the last line held."""

    def __init__(self) -> None:
        self.unit, self.used, self.slots, self.total, self.flops = "", 0.0, 0.0, 0.0, 0.0

    def add(self, content: Any, share: float, flops: float) -> None:
        """A step's content; `share`: of the global batch, how many times this process's rows it has."""
        self.unit, self.flops = content.unit, self.flops + flops
        self.used, self.slots, self.total = (
            self.used + content.used,
            self.slots + content.slots,
            self.total + share * content.used,
        )

    def rates(self, seconds: float, peak_flops: float) -> dict[str, float]:
        """Throughput of all processes, padding share of this one's rows, and utilisation where it can be told."""
        if not self.slots or seconds <= 0:
            return {}
        rates = {f"{self.unit}_per_second": round(self.total / seconds, 2)}
        rates["padding_share"] = round(1 - self.used / self.slots, 4)
        if self.flops and peak_flops:
            rates["utilisation"] = round(self.flops / seconds / peak_flops, 4)
        return rates


def _times(seconds: dict[str, float], steps: int) -> dict[str, float]:
    names = {"data": "data_seconds", "step": "compute_seconds", "save": "save_seconds", "evaluate": "evaluate_seconds"}
    times = {name: round(seconds.get(phase, 0.0) / steps, 5) for phase, name in names.items()}
    busy = seconds.get("data", 0.0) + seconds.get("step", 0.0)
    return {"steps_per_second": round(steps / max(busy, 1e-9), 3), **times}


def _device_memory() -> dict[str, float]:
    """Peak of the fullest device of this process; nothing where a platform does not tell."""
    found = {}
    for device in jax.local_devices():
        with contextlib.suppress(RuntimeError):
            stats = device.memory_stats() or {}
            peak, limit = stats.get("peak_bytes_in_use", 0), stats.get("bytes_limit", 0)
            if peak > found.get("peak", 0):
                found = {"peak": peak, "limit": limit}
    if not found:
        return {}
    shares = {"device_memory_share": round(found["peak"] / found["limit"], 4)} if found["limit"] else {}
    return {"device_memory_gib": round(found["peak"] / 2**30, 3), **shares}
