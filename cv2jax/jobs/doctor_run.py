"""What `cv2jax doctor` looks at: a run as its workdir has it, and what a finding about it says."""

import dataclasses
import fcntl
import json
import pathlib
import time
from typing import Any, Literal

import numpy as np

from cv2jax.config import TrainConfig, flatten_dict, to_dict
from cv2jax.remote import is_held, is_remote, modified
from cv2jax.train.audit import FILE, read_audit
from cv2jax.train.metrics import read_metrics
from cv2jax.train.run import END_FILE, load_run

Panel = Literal["loss", "gradient", "evaluation", "time", "speed", "padding"]
Series = tuple[np.ndarray, np.ndarray]  # steps, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A likely fault: its name, what shows it, what mends it; `score` in [0, 1] says how sure and how grave, `step` where."""

    fault: str
    evidence: str
    mend: str
    score: float
    panel: Panel = "loss"
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.fault}: {self.evidence}; {self.mend}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a workdir holds.

    Attributes:
      config: dotted keys, with today's defaults for those that a run of before lacks.
      train, evaluations, skipped: lines of the metrics by kind. end: `end.json`, {} without.
      is_running: whether a process holds the workdir; age: seconds since it last wrote.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    planned_padding: float | None
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    audit: dict[int, dict[str, int]]
    end: dict[str, Any]
    checkpoints: list[int]
    damaged: list[str]
    is_running: bool
    age: float

    @property
    def last_step(self) -> int:
        """The last step that left a trace."""
        lines = [line["step"] for line in (*self.train, *self.evaluations)]
        return max([0, *lines, *self.audit, *self.checkpoints])

    def series(self, name: str, kind: Literal["train", "evaluate"] = "train") -> Series:
        """(steps, values) of a metric where it is a finite number."""
        lines = self.train if kind == "train" else self.evaluations
        found = [(x["step"], x[name]) for x in lines if _is_number(x.get(name))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def share(self, part: str, of: tuple[str, ...]) -> Series:
        """(steps, share) of one of a line's times in the sum of several."""
        lines = [x for x in self.train if all(_is_number(x.get(name)) for name in (part, *of))]
        whole = [sum(x[name] for name in of) for x in lines]
        shares = [x[part] / total if total else 0.0 for x, total in zip(lines, whole, strict=True)]
        return np.array([x["step"] for x in lines], np.int64), np.array(shares, np.float64)


def open_run(workdir: pathlib.Path) -> Run:
    """Reads a run; UserError for a directory without one, and for a record that cannot be read."""
    run = load_run(workdir)
    defaults = flatten_dict(to_dict(TrainConfig(name="", task="", model={}, num_steps=1)))
    config = defaults | flatten_dict(run["config"])
    lines = read_metrics(workdir / "metrics.jsonl")
    kinds = {kind: [x for x in lines if x["kind"] == kind] for kind in ("train", "evaluate", "skipped")}
    traces = [path for path in (workdir / "metrics.jsonl", workdir / FILE) if path.exists()]
    written = max((modified(path) for path in traces), default=time.time())
    return Run(
        workdir=workdir,
        config=config,
        planned_padding=run.get("planned_padding"),
        train=kinds["train"],
        evaluations=kinds["evaluate"],
        skipped=kinds["skipped"],
        audit=read_audit(workdir / FILE),
        end=_read_end(workdir / END_FILE),
        checkpoints=sorted(int(p.name) for p in _folders(workdir / "checkpoints") if p.name.isdecimal()),
        damaged=sorted(p.name for p in _folders(workdir / "checkpoints-damaged")),
        is_running=is_held(workdir) if is_remote(workdir) else _is_locked(workdir / "lock"),
        age=max(0.0, time.time() - written),
    )


def _read_end(path: pathlib.Path) -> dict[str, Any]:
    try:
        end = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return end if isinstance(end, dict) else {}


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _is_locked(path: pathlib.Path) -> bool:
    """Whether a training holds the file; False where it is not there or cannot be asked."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
