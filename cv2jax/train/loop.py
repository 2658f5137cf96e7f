"""The training loop: straight down, one task of any kind, resumed from the step alone.

Everything that must be equal between an unbroken and a resumed run (batches, draws, parameters, logged values) is a
function of the step; the loop only decides when to look.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
from absl import logging
from jax.sharding import Mesh

from cv2jax.config import TrainConfig, UserError, format_config
from cv2jax.parallel.distributed import from_first_process, global_batch, local_rows, to_host
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.clock import Clock
from cv2jax.train.hashes import state_hash
from cv2jax.train.recorder import Recorder
from cv2jax.train.run import end_noted, note_end, save_or_compare
from cv2jax.train.state import TrainState, make_state
from cv2jax.train.step import CompiledByShape, batch_key, compile_steps, count_flops_by_shape
from cv2jax.train.stop import EXIT_PREEMPTED, StopSignal, processes_with
from cv2jax.train.task import Task
from cv2jax.train.trace import Tracer, parse_steps
from cv2jax.train.wandb_log import wandb_project
from cv2jax.train.watchdog import Watchdog

MAX_STEPS_AHEAD = 2  # of the device, by the host


def train(
    task: Task,
    config: TrainConfig,
    workdir: pathlib.Path,
    stop: StopSignal | None = None,
    *,
    count_flops: Callable[..., float] | None = None,
    peak_flops: float = 0.0,
) -> int:
    """Trains to `config.num_steps`, resuming whatever `workdir` holds; returns 0, or EXIT_PREEMPTED after SIGTERM.

    Args:
      stop: an entered StopSignal of a caller that watches since before the task was made; None watches from here on.
      count_flops: count_flops(function, *shapes) → FLOPs of a call; peak_flops: of one device, a second. With both, the
        record has the utilisation.
    """
    # ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────
    first = jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    for size in sorted(task.batch_sizes()):
        local_rows(mesh, size)
    traced, wandb = parse_steps(config.profile_steps), wandb_project(config)
    logging.info("config of %s\n%s", config.name, format_config(config))
    logging.info("mesh %s over %d %s devices", dict(mesh.shape), mesh.size, jax.devices()[0].platform)
    # ── state: abstract first, so that every sharding comes from one place ──────────────────────────────────────
    abstract, shardings = abstract_state(task.init_state, mesh)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    clock = Clock()
    with (
        _only_one_in(workdir),
        contextlib.nullcontext(stop) if stop else StopSignal() as stop,
        end_noted(workdir, lambda: clock.phase.step - 1, enabled=first),
        Watchdog(clock, workdir, config.stuck_seconds),
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints) as checkpoints,
    ):
        if jax.process_count() > 1:
            stop.share()
        _refuse_imported(checkpoints, workdir)
        started, padding = checkpoints.latest_step is not None, task.planned_padding()
        save_or_compare(workdir, config, task.facts(), started=started, write=first, planned_padding=padding)
        if first:
            task.keep(workdir)
        state, start = checkpoints.restore(abstract) or (None, 0)
        if start >= config.num_steps:
            logging.info("%s has all its %d steps already", workdir, config.num_steps)
            return _end(workdir, start, 0)
        if state is not None:
            logging.info("resuming %s at step %d of %d", workdir, start, config.num_steps)
        else:
            state = task.warm_start(make_state(task.init_state, shardings, init_key))
        millions = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
        logging.info("%.3f M parameters, hash of the state %d", millions, state_hash(state))  # compiled before a save
        clock.enter("start", start + 1)
        if processes_with(stop.asked):  # before anything that takes minutes; nothing is new that would have to be saved
            logging.warning("asked to stop before step %d; the same command goes on from there", start + 1)
            return _end(workdir, start, EXIT_PREEMPTED)
        # ── everything that compiles for training, before the first batch ───────────────────────────────────────
        step, specs = task.make_step(), task.batch_specs()
        steps = compile_steps(step, abstract, shardings, specs, mesh)
        flops = count_flops_by_shape(count_flops, step, abstract, specs, mesh) if first and count_flops else {}
        evaluate = task.make_evaluate(mesh, abstract)
        options = {"enabled": first, "wandb": wandb, "peak_flops": peak_flops * mesh.size}
        with (
            Recorder(task, config, workdir, start, clock, **options) as recorder,
            Tracer(workdir, traced, stop, enabled=first) as tracer,
        ):
            run = _Run(task, config, mesh, steps, flops, evaluate, step_key, checkpoints, recorder, clock, stop, tracer)
            code = run.train(state, start)
        clock.enter("save", config.num_steps)
        checkpoints.wait()
        return _end(workdir, checkpoints.latest_step or 0, code)


@dataclasses.dataclass
class _Run:
    """The loop itself, once everything is compiled."""

    task: Task
    config: TrainConfig
    mesh: Mesh
    steps: CompiledByShape
    flops: dict[Any, float]
    evaluate: Callable[[TrainState], dict[str, Any]]
    key: jax.Array
    checkpoints: Checkpoints
    recorder: Recorder
    clock: Clock
    stop: StopSignal
    tracer: Tracer

    def train(self, state: TrainState, start: int) -> int:
        """From the state after step `start` to the last, or until all processes are asked to stop; the exit code."""
        config, recorder = self.config, self.recorder
        if start and start % config.evaluate_every == 0 and from_first_process(not recorder.has_evaluated(start)):
            self._evaluate(start, state, draw=False)  # a stop had no time for it
        window: list[dict[str, jax.Array]] = []  # metrics still on the device: fetching each step would stall it
        batches = self.task.batches(start, config.num_steps, self.mesh)
        for index, size, local in self.clock.waits(batches, start + 1, lambda: _is_done(window)):
            step = index + 1
            self.tracer.before(step)
            batch = global_batch(self.mesh, local, size)
            with (
                jax.set_mesh(self.mesh),
                axis_rules(),
                jax.transfer_guard_host_to_device("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=step),
            ):
                state, metrics = self.steps.for_batch(batch)(state, batch, self.key)
            window.append(metrics)
            recorder.started(step, size, local, self.flops.get(batch_key(batch), 0.0))
            if len(window) > MAX_STEPS_AHEAD:  # else batches of all steps up to the next line pile up on the device
                jax.block_until_ready(window[-1 - MAX_STEPS_AHEAD]["loss"])
            self.tracer.after(step, metrics)
            # What is due is decided by the step alone, so that a stop or a resume adds no line and moves none.
            last, stopping = step == config.num_steps, self.stop.requested(step)
            line_due = step % config.log_every == 0 or last
            save_due = step % config.save_every == 0 or last or stopping
            if line_due or save_due:
                recorder.record(step, to_host(window), line=line_due, saving=save_due)
                window.clear()
            if save_due and not last:  # before an evaluation, which takes its time and may fail
                self._save(step, state)
            if (step % config.evaluate_every == 0 and not stopping) or last:
                self._evaluate(step, state, draw=last)
            if last:  # with it the run counts as finished, so its evaluation comes first
                self._save(step, state)
            if stopping and not last:
                self.checkpoints.wait()
                logging.warning("asked to stop: step %d is saved; the same command goes on from it", step)
                return EXIT_PREEMPTED
        return 0

    def _save(self, step: int, state: TrainState) -> None:
        self.clock.enter("save", step)
        self.checkpoints.save(step, state)

    def _evaluate(self, step: int, state: TrainState, *, draw: bool) -> None:
        self.clock.enter("evaluate", step)
        self.recorder.record_evaluation(step, self.evaluate(state), draw=draw)


def _end(workdir: pathlib.Path, step: int, code: int) -> int:
    if jax.process_index() == 0:
        note_end(workdir, step, "asked to stop" if code else "finished", code)
    return code


def _is_done(window: list[dict[str, jax.Array]]) -> bool:
    """Whether the device has nothing left to do."""
    return not window or cast(Any, window[-1]["loss"]).is_ready()  # which jax.Array does not declare


def _refuse_imported(checkpoints: Checkpoints, workdir: pathlib.Path) -> None:
    """UserError for a workdir with weights that no training of ours saved."""
    if checkpoints.latest_step == 0:
        raise UserError(
            f"{workdir}: holds imported weights, which training would replace; train in another --workdir with"
            f" --set init_from={workdir}"
        )


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
