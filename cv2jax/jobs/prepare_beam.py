"""The shards of `cv2jax prepare` by an Apache Beam pipeline, on whatever runner its options name.

    Create (a few numbers a shard) → Reshuffle → build_shard → ToList → one file of outcomes

Shards are written straight to the corpus, which all workers must see under the same path. Beam may run a bundle twice, or
twice at once: shards and notes appear whole, and making one again gives the same bytes. Which lines a shard holds is read
from a file beside the notes, since pipelines of many megabytes are refused by runners.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cv2jax.config import UserError
from cv2jax.data.corpus_index import write_bytes
from cv2jax.data.shard_builder import ShardOutcome, ShardTask, build_shard
from cv2jax.files import temporary_beside

_ROWS = np.dtype([("offset", np.uint64), ("line", np.uint32)])

Element = tuple[int, str, int, int, int]  # position among the tasks, split, number, first and last row in the file


def make_pipeline(arguments: Sequence[str], workers: int) -> Callable[..., list[ShardOutcome]]:
    """What turns tasks into outcomes by a pipeline with Beam's options `arguments`, ["--runner=FlinkRunner", …].

    Without a runner among them, `workers` processes of this machine do it. UserError where Apache Beam is not installed or
    does not take the options.
    """
    try:
        beam = importlib.import_module("apache_beam")
        options = importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
        raise UserError(f"--engine beam needs Apache Beam ({error}): pip install 'cv2jax[beam]'") from None
    flags = list(arguments)
    if not any(word.split("=")[0] == "--runner" for word in flags):
        # Not DirectRunner, which would first try to fetch a program from GitHub.
        flags += ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # of argparse, which prints and exits
            parsed = options.PipelineOptions(flags)
            parsed.get_all_options()  # looks at each of them
            pipeline = beam.Pipeline(options=parsed)
    except (SystemExit, ValueError, ImportError, AttributeError) as error:
        reason = (said.getvalue().splitlines() or [str(error)])[-1]
        raise UserError(f"Apache Beam does not take {' '.join(arguments)}: {reason}") from None

    def build(tasks: Iterable[ShardTask], *, total: int, workers: int) -> list[ShardOutcome]:
        return _run(beam, pipeline, tasks)

    return build


def _run(beam: Any, pipeline: Any, tasks: Iterable[ShardTask]) -> list[ShardOutcome]:
    template, elements, rows = _split_tasks(tasks)
    notes = pathlib.Path(template.root, ".prepare")
    # Named by content: workers of a launch that was killed, whose job goes on, may still read it.
    rows_path = notes / f".rows-{hashlib.sha256(rows.tobytes()).hexdigest()[:16]}.tmp"
    outcomes_path = temporary_beside(notes / "outcomes")
    write_bytes(rows_path, rows.tobytes())
    try:
        with pipeline:
            _ = (
                pipeline
                | "Shards" >> beam.Create(elements)
                | "Spread" >> beam.Reshuffle()
                | "Build" >> beam.Map(_build, template, str(rows_path))
                | "Gather" >> beam.combiners.ToList()
                | "Write" >> beam.Map(_write_outcomes, str(outcomes_path))
            )
        found = sorted(map(json.loads, outcomes_path.read_text(encoding="utf-8").splitlines()))
    except RuntimeError as error:  # so all runners tell that they failed, with a traceback of a worker or without
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        mend = "finished shards are kept: give the same command again"
        raise UserError(f"the pipeline failed, a worker was killed perhaps ({reason}); {mend}") from error
    finally:
        rows_path.unlink(missing_ok=True)
        outcomes_path.unlink(missing_ok=True)
    outcomes = []
    for _, failure, fields in found:
        if failure:
            raise UserError(f"{failure}; finished shards are kept: give the same command again")
        outcomes.append(ShardOutcome(**fields))
        if outcomes[-1].error is not None:
            raise UserError(f"{outcomes[-1].error} (--strict; the other shards were made)")
    return outcomes


def _split_tasks(tasks: Iterable[ShardTask]) -> tuple[ShardTask, list[Element], np.ndarray]:
    """A task without lines, what of each task differs from it, and the lines of them all."""
    found = list(tasks)
    elements, rows, first = [], np.zeros(sum(len(task.line) for task in found), _ROWS), 0
    for position, task in enumerate(found):
        last = first + len(task.line)
        rows["offset"][first:last], rows["line"][first:last] = task.offset, task.line
        elements.append((position, task.split, task.number, first, last))
        first = last
    nothing = np.zeros(0, _ROWS)
    return dataclasses.replace(found[0], offset=nothing["offset"], line=nothing["line"]), elements, rows


def _build(element: Element, template: ShardTask, rows_path: str) -> str:
    """Makes one shard; returns JSON: its position, why it failed, its outcome. Runs on Beam's workers."""
    _use_one_blas_thread()
    position, split, number, first, last = element
    rows = np.fromfile(rows_path, _ROWS, count=last - first, offset=first * _ROWS.itemsize)
    task = dataclasses.replace(template, split=split, number=number, offset=rows["offset"], line=rows["line"])
    try:
        return json.dumps([position, "", dataclasses.asdict(build_shard(task))])
    except UserError as error:  # a full disk: Beam would tell it as a traceback
        return json.dumps([position, str(error), None])
    except OSError as error:
        return json.dumps([position, f"{error.filename or task.shard_path}: {error.strerror or error}", None])


def _write_outcomes(outcomes: list[str], path: str) -> None:
    write_bytes(pathlib.Path(path), "\n".join(outcomes).encode())


@functools.cache
def _use_one_blas_thread() -> None:
    """Once a process, as in the one-machine path: workers do not fight, and sums never change order."""
    importlib.import_module("threadpoolctl").threadpool_limits(1, "blas")
