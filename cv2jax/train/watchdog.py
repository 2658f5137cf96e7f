"""A thread that ends a process whose run is stuck, so that its launcher starts it anew; all threads' stacks are left behind."""

import faulthandler
import os
import pathlib
import threading
from collections.abc import Callable
from types import TracebackType

import jax
from absl import logging

from cv2jax.train.clock import Clock, Phase
from cv2jax.train.run import note_end

EXIT_STUCK = 79  # behind sysexits' codes: nothing else ends so
_MEDIANS = 20  # of a step's time: so slow a step is stuck, whatever the seconds
_LONG_PHASES = {"start": 4, "evaluate": 4}  # compilation and evaluation take longer than a step, by design
_EVALUATIONS = 5  # times the longest evaluation so far


class Watchdog:
    """Ends the process with EXIT_STUCK once a phase lasts longer than it may; a context manager.

    A data wait, device step or save may last `seconds`, or 20 median steps if that is more; start-up (compilation with it)
    and an evaluation four times as long, an evaluation also 5 times the longest before it. `seconds` 0: no watchdog.
    The thread sleeps as long as no phase can be over its time, so it costs nothing.
    """

    def __init__(
        self, clock: Clock, workdir: pathlib.Path, seconds: float, end: Callable[[int], object] = os._exit
    ) -> None:
        self._clock, self._workdir, self._seconds, self._end = clock, workdir, seconds, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._seconds:
            self._thread.join()

    def allowed(self, phase: Phase) -> float:
        """Seconds that a phase may last."""
        least = self._seconds * _LONG_PHASES.get(phase.name, 1)
        if phase.name == "evaluate":
            return max(least, _EVALUATIONS * self._clock.longest_evaluation)
        return max(least, _MEDIANS * self._clock.median_step_seconds)

    def _watch(self) -> None:
        wait = self._seconds
        while not self._done.wait(wait):
            phase = self._clock.phase
            left = self.allowed(phase) - self._clock.elapsed(phase)
            if left <= 0:
                self._bark(phase)
                return
            wait = min(left, self._seconds)  # the phase after this one may be a shorter one

    def _bark(self, phase: Phase) -> None:
        process, seconds = jax.process_index(), self._clock.elapsed(phase)
        said = f"process {process}: stuck: the {phase} has taken {seconds:.0f} s"
        path = self._workdir / f"stuck-{phase.step}-process-{process}.txt"
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(said + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            note_end(self._workdir, phase.step - 1, f"stuck in the {phase}", EXIT_STUCK)
            logging.error(
                "%s; stacks of all threads are in %s; the same command goes on from the last save", said, path
            )
        except OSError as error:  # a full disk must not keep it alive
            logging.error("%s; no stacks (%s); the same command goes on from the last save", said, error.strerror)
        finally:
            self._end(EXIT_STUCK)
