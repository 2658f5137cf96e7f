"""`cv2jax bench overhead`: what async saving and logging cost a training step, measured in pairs within one run.

Blocks of steps with and without take turns, in an order that turns too, on one state and the same batches; what a save still
writes in the background counts for its block. A step of less than 200 ms is repeated until it takes as long.
"""

import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from cv2jax.config import load_config, override, validate
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.tasks import make_task
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.clock import Clock
from cv2jax.train.loop import MAX_STEPS_AHEAD
from cv2jax.train.recorder import Recorder
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps

SAVE_EVERY = 50
STEP_SECONDS = 0.2  # at least
_BATCHES = 4

Figure = tuple[str, str, list[float]]  # case, unit, values of the repeats


class _Steps:
    """Train steps of a preset on a few batches, over and over."""

    def __init__(self, config: Any) -> None:
        self.task, self.config, self.mesh = make_task(config), config, make_mesh(config.mesh)
        abstract, shardings = abstract_state(self.task.init_state, self.mesh)
        self.state = make_state(self.task.init_state, shardings, jax.random.key(0))
        self._steps = compile_steps(self.task.make_step(), abstract, shardings, self.task.batch_specs(), self.mesh)
        self._key, self.times = jax.random.key(1), 1
        # One shape for all of them: blocks must have equal steps.
        batches = self.task.batches(0, 8 * _BATCHES, self.mesh)
        first = next(batches)
        shape = {name: rows.shape for name, rows in first[2].items()}
        alike = (b for b in batches if {name: rows.shape for name, rows in b[2].items()} == shape)
        self._batches = [first, *itertools.islice(alike, _BATCHES - 1)]
        for times in (1, 2):  # warm-up, then what a step takes
            seconds = self.block(3) / 3
            self.times = math.ceil(STEP_SECONDS / seconds) if times == 2 else 1

    def one(self, index: int) -> tuple[dict[str, jax.Array], tuple[int, int, Any]]:
        """(metrics of a step, its batch)."""
        batch = self._batches[index % len(self._batches)]
        metrics: dict[str, jax.Array] = {}
        for _ in range(self.times):
            arrays = global_batch(self.mesh, batch[2], batch[1])
            with jax.set_mesh(self.mesh), axis_rules():
                self.state, metrics = self._steps.for_batch(arrays)(self.state, arrays, self._key)
        return metrics, batch

    def block(self, num_steps: int, each: Callable[[int, list[Any], Any], None] = lambda *_: None) -> float:
        """Seconds of so many steps as the loop runs them, `each(number, metrics on the device, batch)` behind every one."""
        jax.block_until_ready(self.state)
        start, window = time.perf_counter(), []
        for number in range(1, num_steps + 1):
            metrics, batch = self.one(number)
            window.append(metrics)
            if len(window) > MAX_STEPS_AHEAD:
                jax.block_until_ready(window[-1 - MAX_STEPS_AHEAD]["loss"])
            each(number, window, batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def measure_overhead(options: BenchOptions, place: pathlib.Path) -> list[Figure]:
    """Percent that a save every 50 steps, and the record of every step with its lines, add to the time of the steps."""
    config = override(load_config(f"speech_tokenizer_{options.size or 'tiny'}"), [f"data.corpus={options.corpus}"])
    validate(config)
    steps = _Steps(config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(steps.state)) / 2**20
    seconds = steps.block(3) / 3
    case = f"{config.name}, steps of {1e3 * seconds:.0f} ms" + (f" ({steps.times} as one)" if steps.times > 1 else "")
    saving, blocked = _measure_saving(steps, options.repeats, place)
    logging, logged = _measure_logging(steps, options.repeats, place)
    return [
        (f"{case}: async save of {size:.0f} MiB every {SAVE_EVERY} steps", "% overhead", saving),
        (f"{case}: a save blocks the loop for", "ms", blocked),
        (f"{case}: logging, a line every {config.log_every} steps", "% overhead", logging),
        (f"{case}: time inside the recorder", "% of the step", logged),
    ]


def _measure_saving(steps: _Steps, repeats: int, place: pathlib.Path) -> tuple[list[float], list[float]]:
    blocked: list[float] = []
    numbers = itertools.count(1)
    with Checkpoints(place / "checkpoints", keep=2) as checkpoints:

        def saved() -> float:
            jax.block_until_ready(steps.state)
            start = time.perf_counter()
            checkpoints.save(next(numbers), steps.state)
            inside = time.perf_counter() - start
            blocked.append(1e3 * inside)
            seconds = steps.block(SAVE_EVERY)
            start = time.perf_counter()
            checkpoints.wait()
            return inside + seconds + time.perf_counter() - start

        saved()  # the first one compiles the hash
        blocked.clear()
        return _pairs(saved, lambda: steps.block(SAVE_EVERY), repeats), blocked


def _measure_logging(steps: _Steps, repeats: int, place: pathlib.Path) -> tuple[list[float], list[float]]:
    config, inside = steps.config, [0.0]
    clock, shares = Clock(), []
    workdir = place / "run"
    workdir.mkdir()
    with Recorder(steps.task, config, workdir, 0, clock, enabled=True) as recorder:
        done = itertools.count(1)

        def each(number: int, window: list[Any], batch: Any) -> None:
            del number
            step, fetched = next(done), None
            if step % config.log_every == 0:
                fetched = to_host(window)  # waits for the devices: no time of the recorder's
                window.clear()
            start = time.perf_counter()
            clock.enter("data", step)
            clock.enter("step", step)
            recorder.started(step, batch[1], batch[2], 0.0)
            if fetched is not None:
                recorder.record(step, fetched, line=True, saving=False)
            inside[0] += time.perf_counter() - start

        def logged() -> float:
            inside[0] = 0.0
            seconds = steps.block(2 * config.log_every, each)
            shares.append(100 * inside[0] / seconds)
            return seconds

        logged()
        shares.clear()
        return _pairs(logged, lambda: steps.block(2 * config.log_every), repeats), shares


def _pairs(with_it: Callable[[], float], without: Callable[[], float], repeats: int) -> list[float]:
    """Percent that `with_it` takes longer, pair by pair; who is first takes turns."""
    percents = []
    for turn in range(repeats):
        if turn % 2:
            bare = without()
            full = with_it()
        else:
            full = with_it()
            bare = without()
        percents.append(100 * (full / bare - 1))
    return percents
