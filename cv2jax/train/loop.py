"""The training loop: straight down, one task of any kind, resumed from the step alone.

Everything that must be equal between an unbroken and a resumed run (batches, draws, parameters, logged values) is a
function of the step; the loop only decides when to look.
"""

import contextlib
import fcntl
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from cv2jax.config import TrainConfig, UserError, format_config
from cv2jax.parallel.distributed import from_first_process, global_batch, local_rows, to_host
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.metrics import MetricWriter, draw_curves, read_metrics
from cv2jax.train.run import save_or_compare
from cv2jax.train.state import TrainState, make_state
from cv2jax.train.step import StepFunction, compile_steps
from cv2jax.train.stop import EXIT_PREEMPTED, StopSignal

SECONDS_BETWEEN_DRAWINGS = 60
MAX_SKIPPED_IN_A_ROW = 50
MAX_STEPS_AHEAD = 2  # of the device, by the host


@runtime_checkable
class Task(Protocol):
    """A stage of the pipeline as the loop sees it."""

    def facts(self) -> dict[str, Any]:
        """What besides the config decides the numbers (corpus hash, vocabulary), compared on resume."""
        ...

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0 with logically partitioned parameters."""
        ...

    def warm_start(self, state: TrainState) -> TrainState:
        """The state of step 0 with the parameters that `config.init_from` names in place of its own."""
        ...

    def keep(self, workdir: pathlib.Path) -> None:
        """Copies into a run's directory, unless it is there, what its use needs beside the checkpoint; one process calls it."""
        ...

    def make_step(self) -> StepFunction:
        """step(state, batch, key) → (state, metrics), not compiled."""
        ...

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Every static shape of a global batch."""
        ...

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """(step, global batch size, this process's rows) of steps start_step … num_steps - 1."""
        ...

    def utterance_ids(self, step: int) -> list[str]:
        """Names of the rows of a step's global batch, for tracing."""
        ...

    def batch_sizes(self) -> set[int]:
        """Rows of every global batch, training and evaluation: each must divide over the mesh."""
        ...

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """evaluate(state) → held-out metrics, the same on every process; compiled for every shape when this returns."""
        ...


def train(task: Task, config: TrainConfig, workdir: pathlib.Path, stop: StopSignal | None = None) -> int:
    """Trains to `config.num_steps`, resuming whatever `workdir` holds; returns 0, or EXIT_PREEMPTED after SIGTERM.

    `stop` is an entered StopSignal of a caller that watches since before the task was made; None watches from here on.
    """
    # ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    for size in sorted(task.batch_sizes()):
        local_rows(mesh, size)
    logging.info("config of %s\n%s", config.name, format_config(config))
    logging.info("mesh %s over %d %s devices", dict(mesh.shape), mesh.size, jax.devices()[0].platform)
    # ── state: abstract first, so that every sharding comes from one place ──────────────────────────────────────
    abstract, shardings = abstract_state(task.init_state, mesh)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    with (
        _only_one_in(workdir),
        contextlib.nullcontext(stop) if stop else StopSignal() as stop,
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints) as checkpoints,
    ):
        if jax.process_count() > 1:
            stop.share()
        start = _first_step(checkpoints, workdir)
        save_or_compare(workdir, config, task.facts(), started=start > 0, write=first)
        if first:
            task.keep(workdir)
        if start >= config.num_steps:
            logging.info("%s has all its %d steps already", workdir, config.num_steps)
            return 0
        if start:
            state = checkpoints.load(abstract)
            logging.info("resuming %s at step %d of %d", workdir, start, config.num_steps)
        else:
            state = task.warm_start(make_state(task.init_state, shardings, init_key))
        logging.info("%.3f M parameters", sum(x.size for x in jax.tree.leaves(state.params)) / 1e6)
        if stop.asked:  # before anything that takes minutes; nothing is new that would have to be saved
            logging.warning("asked to stop before step %d; the same command goes on from there", start + 1)
            return EXIT_PREEMPTED
        # ── everything that compiles for training, before the first batch ───────────────────────────────────────
        steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
        evaluate = task.make_evaluate(mesh, abstract)
        # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────
        window: list[dict[str, jax.Array]] = []  # metrics still on the device: fetching each step would stall it
        with _Recorder(task, config, workdir, start, enabled=first) as recorder:
            if start and start % config.evaluate_every == 0 and from_first_process(not recorder.has_evaluated(start)):
                recorder.record_evaluation(start, evaluate(state), draw=False)  # a stop had no time for it
            for index, batch_size, local in task.batches(start, config.num_steps, mesh):
                batch = global_batch(mesh, local, batch_size)
                with jax.set_mesh(mesh), axis_rules(), jax.transfer_guard_host_to_device("disallow"):
                    state, metrics = steps.for_batch(batch)(state, batch, step_key)
                step = index + 1
                window.append(metrics)
                if len(window) > MAX_STEPS_AHEAD:  # else batches of all steps up to the next line pile up on the device
                    jax.block_until_ready(window[-1 - MAX_STEPS_AHEAD]["loss"])
                # What is due is decided by the step alone, so that a stop or a resume adds no line and moves none.
                last, stopping = step == config.num_steps, stop.requested(step)
                line_due = step % config.log_every == 0 or last
                save_due = step % config.save_every == 0 or last or stopping
                if line_due or save_due:
                    recorder.record(step, to_host(window), line=line_due)
                    window = []
                if save_due and not last:  # before an evaluation, which takes its time and may fail
                    checkpoints.save(step, state)
                if (step % config.evaluate_every == 0 and not stopping) or last:
                    recorder.record_evaluation(step, evaluate(state), draw=last)
                if last:  # with it the run counts as finished, so its evaluation comes first
                    checkpoints.save(step, state)
                if stopping and not last:
                    checkpoints.wait()
                    logging.warning("asked to stop: step %d is saved; the same command goes on from it", step)
                    return EXIT_PREEMPTED
        checkpoints.wait()
    return 0


def _first_step(checkpoints: Checkpoints, workdir: pathlib.Path) -> int:
    """The step to go on from; UserError for a workdir with weights that no training of ours saved."""
    if checkpoints.latest_step == 0:
        raise UserError(
            f"{workdir}: holds imported weights, which training would replace; train in another --workdir with"
            f" --set init_from={workdir}"
        )
    return checkpoints.latest_step or 0


class _Recorder:
    """Writes what happened: metric lines, curves, progress; the first process alone, but for what must stop all of them."""

    def __init__(self, task: Task, config: TrainConfig, workdir: pathlib.Path, start: int, *, enabled: bool) -> None:
        self._task, self._config, self._workdir, self._enabled = task, config, workdir, enabled
        self._writer = MetricWriter(workdir, start, enabled=enabled)
        self._interactive = enabled and sys.stderr.isatty()
        total = config.num_steps
        self._progress = tqdm(total=total, initial=start, desc=config.name, unit="step", disable=not self._interactive)
        self._since, self._drawn = time.monotonic(), float("-inf")
        self._line_step, self._skipped_in_a_row = start, 0

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *unused: object) -> None:
        self._writer.close()
        self._progress.close()

    def has_evaluated(self, step: int) -> bool:
        """Whether the record holds the evaluation of a step."""
        return any(x["step"] == step and x["kind"] == "evaluate" for x in read_metrics(self._workdir / "metrics.jsonl"))

    def record(self, step: int, window: list[dict[str, np.ndarray]], *, line: bool) -> None:
        """The steps up to `step`, metrics fetched: traces skipped ones and, if `line`, logs the last one's values.

        Raises UserError when nothing but skipped steps came for a while: training on would only look like training.
        """
        for which, metrics in enumerate(window, start=step - len(window) + 1):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped"] else 0
            if metrics["skipped"]:
                self._record_skipped(which, metrics)
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"{self._skipped_in_a_row} steps in a row up to step {which} had no finite loss or gradient; "
                    "lower optimizer.learning_rate or set compute_dtype=float32 and give the same command in a new --workdir"
                )
        self._progress.update(len(window))
        if not line:
            return
        values = {k: v for k, v in window[-1].items() if np.ndim(v) == 0 and k != "skipped"}
        rate = (step - self._line_step) / (time.monotonic() - self._since)
        self._writer.write(step, "train", {**values, "steps_per_second": round(rate, 3)})
        self._progress.set_postfix_str(f"loss {float(values['loss']):.3f}", refresh=False)
        if self._enabled and not self._interactive:
            logging.info("step %d: loss %.4f, %.2f steps/s", step, float(values["loss"]), rate)
        self._since, self._line_step = time.monotonic(), step

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
        self._since, self._line_step = time.monotonic(), step

    def _record_skipped(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Names the utterances whose rows were not finite, all of the batch's if it was the gradient."""
        ids = self._task.utterance_ids(step - 1)
        finite = metrics.get("row_finite")
        named = ids if finite is None or finite.all() else [i for i, ok in zip(ids, finite, strict=True) if not ok]
        self._writer.write(step, "skipped", {"skipped_utterances": named, "loss": metrics["loss"]})
        logging.warning("step %d was skipped: loss or gradient not finite; utterances %s", step, ", ".join(named[:8]))


@contextlib.contextmanager
def _only_one_in(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the run's directory: two trainings in it would rewrite each other's record and half-written checkpoints."""
    if jax.process_index() > 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{workdir}: another `cv2jax train` is at work there; stop it or wait for it") from None
        except OSError as error:  # a network file system or a mounted bucket
            logging.warning("%s cannot be locked (%s): start no second run in it", workdir, error.strerror)
        yield
