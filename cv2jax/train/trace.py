"""A profiler trace of some steps: those that the config names, or the next ones of a running process after SIGUSR1."""

import pathlib
import re
from types import TracebackType
from typing import Any

import jax
from absl import logging

from cv2jax.config import UserError
from cv2jax.train.stop import StopSignal

_TRACED_STEPS = 5  # after SIGUSR1
_OPEN = (
    "open it with `tensorboard --logdir {}` (pip install tensorboard xprof), or its trace.json.gz at ui.perfetto.dev"
)


def parse_steps(text: str) -> range:
    """The steps of "first:end" (from 1 on, end excluded), none of ""; UserError for anything else."""
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise UserError(f"profile_steps={text}: give first:end with 0 < first < end, such as 100:105")
    return range(int(found[1]), int(found[2]))


class Tracer:
    """Traces into `workdir/profile` on the first process; a context manager. A trace that fails does not end the run."""

    def __init__(self, workdir: pathlib.Path, steps: range, stop: StopSignal, *, enabled: bool) -> None:
        self._place, self._stop, self._enabled = workdir / "profile", stop, enabled
        self._steps = steps
        self._first: int | None = None  # step of the trace that is being taken
        self._last = 0  # step that it has

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._finish()

    def before(self, step: int) -> None:
        """Starts a trace where one is due; call it before each step."""
        if not self._enabled or self._first is not None:
            return
        if self._stop.trace_asked:
            self._stop.trace_asked = False
            self._steps = range(step, step + _TRACED_STEPS)
        if step in self._steps:
            try:
                jax.profiler.start_trace(str(self._place))
                self._first = step
            except (RuntimeError, ValueError, OSError) as error:
                self._give_up(error)

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace behind its last step, once the device has done it."""
        self._last = step
        if self._first is not None and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self._finish()

    def _finish(self) -> None:
        first, self._first = self._first, None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, ValueError, OSError) as error:
            self._give_up(error)
            return
        self._steps = range(0)
        logging.info(
            "profiler trace of steps %d to %d is in %s; %s", first, self._last, self._place, _OPEN.format(self._place)
        )

    def _give_up(self, error: Exception) -> None:
        self._steps = range(0)
        logging.warning("no profiler trace (%s)", (str(error).splitlines() or [type(error).__name__])[0])
