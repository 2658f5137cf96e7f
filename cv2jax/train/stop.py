"""Being asked to stop: SIGTERM as a wish that the loop grants after a step, from the first moment of a run on."""

import signal
from types import FrameType

EXIT_PREEMPTED = 75  # sysexits' EX_TEMPFAIL: the same command goes on where this one stopped


class StopSignal:
    """Notes SIGTERM instead of dying of it, from its `with` on; several processes agree on the step at which all stop.

    It imports no jax until it is asked: it must stand before anything that takes time.
    """

    def __enter__(self) -> "StopSignal":
        self.asked = False
        self._several = False
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        if not self._several:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
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
