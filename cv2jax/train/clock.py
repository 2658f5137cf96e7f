"""Where the time of a run goes, phase by phase: what its record says of it, and what the watchdog looks at."""

import collections
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

PhaseName = Literal["start", "data", "step", "save", "evaluate"]
_WORDS = {
    "start": "start-up before step {}",
    "data": "data wait of step {}",
    "step": "device step {}",
    "save": "save of step {}",
    "evaluate": "evaluation at step {}",
}
_STEPS_REMEMBERED = 101


class Phase(NamedTuple):
    """What the loop does, of which step, since when by the clock."""

    name: PhaseName
    step: int
    since: float

    def __str__(self) -> str:
        return _WORDS[self.name].format(self.step)


class Clock:
    """The loop tells it what it does next; any thread may look at `phase`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.phase = Phase("start", 1, now())
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._steps: collections.deque[float] = collections.deque(maxlen=_STEPS_REMEMBERED)
        self._step_seconds = 0.0
        self.longest_evaluation = 0.0

    def enter(self, name: PhaseName, step: int, *, counts_as: PhaseName | None = None) -> None:
        """The phase before ends here (its time is one of `counts_as`, default of its own name) and this one begins."""
        now, before = self._now(), self.phase
        spent = now - before.since
        self._seconds[counts_as or before.name] += spent
        if before.name in ("data", "step") and counts_as != "start":
            self._step_seconds += spent
        if before.name == "evaluate":
            self.longest_evaluation = max(self.longest_evaluation, spent)
        if name == "data":
            if self._step_seconds:
                self._steps.append(self._step_seconds)
            self._step_seconds = 0.0
        self.phase = Phase(name, step, now)  # one assignment: another thread sees the whole of it

    def waits(self, batches: Iterable[Any], first_step: int, is_idle: Callable[[], bool]) -> Iterator[Any]:
        """The batches; the time until each is there counts as data wait if the device has then run dry (`is_idle`).

        That until the first one counts as start-up: the loader starts its workers then.
        """
        iterator, step = iter(batches), first_step
        while True:
            self.enter("data", step)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited: PhaseName = "data" if is_idle() else "step"
            self.enter("step", step, counts_as="start" if step == first_step else waited)
            yield batch
            step += 1

    def elapsed(self, phase: Phase) -> float:
        """Seconds since a phase began."""
        return self._now() - phase.since

    def take(self) -> dict[str, float]:
        """Seconds by phase since this was last called, that of now included."""
        self.enter(*self.phase[:2])
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    @property
    def median_step_seconds(self) -> float:
        """Of the last steps, without saves and evaluations; 0 before the first."""
        steps = list(self._steps)
        return statistics.median(steps) if steps else 0.0
