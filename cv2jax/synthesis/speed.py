"""Faster or slower speech at the same pitch: the mel is interpolated in time, as upstream does offline.

Output frame j lies at (j + 0.5) · speed - 0.5 of the input, between two frames; int(F / speed) frames come of F. Upstream
(spec/official.md 6.2) fits F frames to that whole number of frames instead, which is the same where F / speed is whole, and
off by less than one frame at the end of an utterance elsewhere. Ours can begin before the end is known: a stream is at most
two frames late.
"""

import math

import numpy as np

from cv2jax.config import UserError
from cv2jax.shapes import Float, Float32

SLOWEST, FASTEST = 0.5, 2.0


def check_speed(speed: float) -> None:
    """Raises UserError for a speed outside 0.5 … 2."""
    if not SLOWEST <= speed <= FASTEST:
        raise UserError(f"speed={speed}: give a number from {SLOWEST} (half as fast) to {FASTEST} (twice as fast)")


class SpeedChanger:
    """One utterance's mel, hop by hop, at another speed; the same frames for any hops."""

    def __init__(self, speed: float) -> None:
        check_speed(speed)
        self._speed, self._num_seen, self._num_made = speed, 0, 0
        self._kept: Float32[np.ndarray, "F M"] | None = (
            None  # the last frames seen, which the next output may lie behind
        )

    def push(self, mel: Float[np.ndarray, "F M"], *, last: bool = False) -> Float32[np.ndarray, "F_out M"]:
        """The frames that these make known; `last`: nothing follows. At speed 1 they pass."""
        if self._speed == 1:
            return np.asarray(mel, np.float32)
        known = mel if self._kept is None else np.concatenate([self._kept, mel])
        first = self._num_seen + len(mel) - len(known)  # place of the first frame that is known
        self._num_seen += len(mel)
        total = int(self._num_seen / self._speed)  # of an utterance that ends here, so never too many
        if last:
            total = max(total, min(self._num_seen, 1))
        while not last and total > self._num_made and self._place(total - 1) > self._num_seen - 1:
            total -= 1
        total = max(total, self._num_made)
        places = np.maximum([self._place(j) for j in range(self._num_made, total)], 0.0)
        self._num_made = total
        left = np.floor(places).astype(np.int64)
        right = np.minimum(left + 1, self._num_seen - 1)
        weight = (places - left)[:, None].astype(np.float32)
        made = known[left - first] * (1 - weight) + known[right - first] * weight if len(places) else known[:0]
        keep_from = min(max(math.floor(max(self._place(total), 0.0)), first), self._num_seen)
        self._kept = np.asarray(known[keep_from - first :], np.float32)
        return np.asarray(made, np.float32)

    def _place(self, number: int) -> float:
        return (number + 0.5) * self._speed - 0.5
