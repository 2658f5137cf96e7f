"""How long the hops of a stream are: a short first one, so that sound comes early, then longer ones that never come late.

All is counted in speech tokens of 40 ms. A hop ends where a chunk of the flow does, counted from the start of the voice's
recording; it needs the flow's look-ahead behind it, and its last `hold_back` are heard with the next hop only.
"""

import dataclasses

from cv2jax.config import UserError
from cv2jax.synthesis.stages import LOOKAHEAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopPlan:
    """The plan of every request.

    Attributes:
      real_time_factor: seconds of work that a second of speech takes, all stages together, on this machine with its load.
        Below 1 and not below the truth, a player that starts with the first frame never starves. From 1 on nothing helps: then
        the first hop is the shortest that is heard at all, and the later ones grow as fast as they may, which costs least.
      growth: a hop has at most so many times the chunks of the one before. max_chunks: of any hop.
    """

    real_time_factor: float = 0.5
    growth: int = 2
    max_chunks: int = 4

    def validate(self) -> None:
        """Raises UserError for what is no plan."""
        if not self.real_time_factor > 0:
            raise UserError(f"plan.real_time_factor={self.real_time_factor}: must be positive")
        for name in ("growth", "max_chunks"):
            if getattr(self, name) < 1:
                raise UserError(f"plan.{name}={getattr(self, name)}: must be 1 or more")


class Pace:
    """Where one request stands in its plan; it goes by what was made, never by a clock, so that a request always hops alike."""

    def __init__(self, plan: HopPlan, *, chunk: int, hold_back: float, speed: float = 1.0) -> None:
        """`chunk` of the flow and `hold_back` of the vocoder in tokens; `speed`: so much shorter is what is heard."""
        self._plan, self._chunk, self._hold_back, self._speed = plan, chunk, hold_back, speed
        self._made = self._heard = 0.0  # tokens of sound, in all
        self._lead = 0.0  # made, not yet played
        self._last_chunks = 0

    def next_hop(self, to_border: int) -> int:
        """Tokens of the next hop, where the next chunk ends behind `to_border` of them."""
        return to_border + (self._num_chunks(to_border) - 1) * self._chunk

    def add(self, num_tokens: int) -> None:
        """Tells that a hop of so many tokens was made."""
        self._made += num_tokens / self._speed
        heard = max(self._made - self._hold_back, 0.0)
        if self._heard:
            self._lead = max(self._lead - self._plan.real_time_factor * num_tokens, 0.0)
        self._lead += heard - self._heard
        self._heard = heard
        self._last_chunks = max(round(num_tokens / self._chunk), 1)

    def _num_chunks(self, to_border: int) -> int:
        plan, chunk = self._plan, self._chunk
        if not self._heard:  # what is heard then must last while the next hop of one chunk is made
            wanted = plan.real_time_factor * (chunk + LOOKAHEAD) if plan.real_time_factor < 1 else 0.0
            number = 1
            while (self._made + (to_border + (number - 1) * chunk) / self._speed) - self._hold_back <= wanted:
                number += 1
            return number
        most = min(plan.max_chunks, plan.growth * self._last_chunks)
        if plan.real_time_factor >= 1:
            return most
        lasts = lambda number: (  # noqa: E731
            plan.real_time_factor * (to_border + (number - 1) * chunk + LOOKAHEAD) <= self._lead
        )
        return next((number for number in range(most, 1, -1) if lasts(number)), 1)
