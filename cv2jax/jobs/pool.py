"""Worker processes that jobs share: fresh ones, of one BLAS thread each, that end with their parent; and their progress."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from cv2jax.config import UserError

_SECONDS_BETWEEN_LINES = 30.0
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def start_workers(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of fresh processes with one BLAS thread each: workers do not fight, and sums never change order."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_watch_parent) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_in_order(
    build: Callable[[Task], Outcome], tasks: Iterable[Task], workers: int, take: Callable[[Outcome], None]
) -> list[Outcome]:
    """build(task) of every task, computed by worker processes, each given to `take` in the order of the tasks.

    What `take` raises ends the run; UserError where a worker process was killed.
    """
    outcomes: list[Outcome] = []
    waiting: deque[Future[Outcome]] = deque()

    def finish_first() -> None:
        outcomes.append(waiting.popleft().result())
        take(outcomes[-1])

    with start_workers(workers) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(build, task))
                # A bounded queue: the tasks of a large manifest are not all made at once.
                if len(waiting) >= 4 * workers:
                    finish_first()
            while waiting:
                finish_first()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); finished shards are kept: run again with fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return outcomes


class Progress:
    """A bar on a terminal, else a line now and then: utterances, refusals and speed against real time."""

    def __init__(self, job: str, total: int) -> None:
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=job, unit="utt", disable=not sys.stderr.isatty())
        self._job, self._total = job, total
        self._done = self._refused = 0
        self._seconds = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, utterances: int, speech_seconds: float, refused: int = 0) -> None:
        """Counts one shard: `speech_seconds` of it were worked on now."""
        now = time.monotonic()
        self._done += utterances
        self._refused += refused
        self._seconds += speech_seconds
        shown = [f"{self._refused} refused"] * (self._refused > 0)
        shown.append(f"{self._seconds / max(now - self._start, 1e-9):.1f}x realtime")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(utterances)
        if self._bar.disable and now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            line = ", ".join([f"{self._job}: {self._done} of {self._total} utterances", *shown])
            print(line, file=sys.stderr, flush=True)


def _watch_parent() -> None:
    """Ends this worker with its parent: a pool's workers would outlive a killed one and wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a traceback each
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
