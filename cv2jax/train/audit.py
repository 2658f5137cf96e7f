"""`audit.jsonl`: what every step of a run was trained on, so that two runs can be seen to be the same, step by step."""

import json
import os
import pathlib
from typing import Any

import numpy as np
from absl import logging

from cv2jax.data.content import BatchContent
from cv2jax.train.disk import full_disk_reported

FILE = "audit.jsonl"
COLUMNS = ("step", "epoch", "bucket", "batch_hash", "utterances", "skipped_rows")


class AuditLog:
    """One JSON array a step, behind a first line that names the columns; what lies after `start_step` is taken back first.

    `skipped_rows` are the rows of a skipped step whose loss was not finite, all of them where it was the gradient's.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int) -> None:
        self._path = workdir / FILE
        with full_disk_reported(self._path):
            if not self._path.exists() or not _cut(self._path, start_step):
                self._path.write_text(json.dumps(COLUMNS) + "\n", encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, content: BatchContent, metrics: dict[str, np.ndarray]) -> None:
        """A step's line, kept in memory until `flush`."""
        skipped = 0
        if metrics["skipped"]:
            finite = metrics.get("row_finite", np.zeros(0, np.bool_))
            skipped = int(np.sum(~finite)) or content.num_utterances
        row = (step, content.epoch, content.bucket, int(metrics["batch_hash"]), content.num_utterances, skipped)
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def flush(self, *, sync: bool) -> None:
        """Hands the lines to the system; with `sync` (before a checkpoint of these steps) waits until the disk has them."""
        with full_disk_reported(self._path):
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes."""
        with full_disk_reported(self._path):
            self._file.close()


def read_audit(path: pathlib.Path) -> dict[int, dict[str, int]]:
    """step → its columns, of a file up to its first line that is cut short or damaged; empty without a file."""
    if not path.is_file():
        return {}
    rows = {}
    with path.open("rb") as file:
        if _row(file.readline(), str) is None:
            return {}
        for line in file:
            row = _row(line, int)
            if row is None:
                break
            rows[row[0]] = dict(zip(COLUMNS, row, strict=True))
    return rows


def first_difference(ours: pathlib.Path, theirs: pathlib.Path) -> str | None:
    """The first step that two runs' audits do not share, and how it differs; None if they agree as far as both go.

    Args:
      ours, theirs: workdirs, or audit files.
    """
    ours, theirs = (path / FILE if path.is_dir() else path for path in (ours, theirs))
    a, b = read_audit(ours), read_audit(theirs)
    for step in sorted(set(a) | set(b)):
        if step > min(max(a, default=0), max(b, default=0)):
            break
        if step not in a or step not in b:
            return f"step {step} is only in {ours if step in a else theirs}"
        if a[step] != b[step]:
            columns = [name for name in COLUMNS if a[step][name] != b[step][name]]
            return f"step {step}: " + ", ".join(f"{name} {a[step][name]} → {b[step][name]}" for name in columns)
    return None


def _cut(path: pathlib.Path, last_step: int) -> bool:
    """Takes away the lines behind a step, and all from the first that is none; False if there is nothing to keep."""
    with open(path, "r+b") as file:
        header = file.readline()
        if not last_step or _row(header, str) is None:
            return False
        end, step, whole = len(header), 0, True
        for line in file:
            row = _row(line, int)
            if row is None or row[0] > last_step:
                whole = row is not None
                break
            end, step = end + len(line), row[0]
        file.truncate(end)
    if not whole and step < last_step:
        logging.warning("%s: its lines after step %d were damaged and are gone", path, step)
    return True


def _row(line: bytes, kind: type) -> list[Any] | None:
    """The values of a line; None if it is cut short or none of ours."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    is_row = isinstance(row, list) and len(row) == len(COLUMNS) and all(isinstance(value, kind) for value in row)
    return row if is_row else None
