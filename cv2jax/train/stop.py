"""What a process is asked by signals: to stop (SIGTERM), which the loop grants after a step, and for a trace (SIGUSR1)."""

import signal
from types import FrameType

EXIT_PREEMPTED = 75  # sysexits' EX_TEMPFAIL: the same command goes on where this one stopped


class StopSignal:
    """Notes SIGTERM instead of dying of it, from its `with` on; several processes agree on the step at which all stop.

    SIGUSR1 sets `trace_asked`, which whoever traces takes back. It imports no jax until it is asked: it must stand before
    anything that takes time.
    """

    def __enter__(self) -> "StopSignal":
        self.asked = self.trace_asked = False
        self._several = False
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        self._previous_user = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous_user)
        if not self._several:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.trace_asked = True
        else:
            self.asked = True

    def share(self) -> None:
        """Says that this process is one of several: JAX's preemption service then owns SIGTERM and spreads the word."""
        self._several = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; call it once a step on every process."""
        if not self._several:
            return self.asked
        from cv2jax.parallel.distributed import reached_stop

        return reached_stop(step)


def processes_with(condition: bool) -> list[int]:
    """The processes for which it holds, the same answer on all of them; each must call it."""
    import jax

    if jax.process_count() == 1:
        return [0] if condition else []
    import numpy as np
    from jax.experimental import multihost_utils

    return np.flatnonzero(multihost_utils.process_allgather(np.array(condition))).tolist()
