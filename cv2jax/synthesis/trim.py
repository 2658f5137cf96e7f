"""Cutting a prompt so that little of it has to be solved again: only ever the silence before and behind the speech.

A voice caches the whole chunks of its prompt whose look-ahead lies inside it; what is left is fed again with the first hop of
every request. With chunks of C tokens and a look-ahead of A, P tokens leave P - max(P - A, 0) // C · C, at best A of them.
To cut inside the speech would part the recording from its transcript, so that is left to who made it.
"""

import dataclasses
import math

from cv2jax.synthesis.clip import ClipMeasures
from cv2jax.synthesis.stages import TOKENS_PER_SECOND

_KEPT_SECONDS = 0.1  # of silence, on either side of the speech, below which nothing is cut
_MAX_PAUSE_SECONDS = 0.5  # more of it is always cut: voices imitate it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What stays of a recording: samples from `start` to `end`."""

    start: int
    end: int


def num_fed_again(num_tokens: int, chunk: int, lookahead: int) -> int:
    """Tokens of a prompt that every request's first hop solves again, under a mask of chunks."""
    return num_tokens - max(num_tokens - lookahead, 0) // chunk * chunk


def best_lengths(num_tokens: int, chunk: int, lookahead: int) -> tuple[int, int]:
    """The nearest prompts, in tokens, not longer and longer than this one, of which only the look-ahead is fed again."""
    below = (num_tokens - lookahead) // chunk * chunk + lookahead
    return max(below, 0), max(below, 0) + chunk


def plan_cut(
    num_samples: int, rate_hz: int, measures: ClipMeasures, *, chunk: int | None = None, lookahead: int = 0
) -> Cut:
    """Where to cut a recording of which `measures` say where it sounds.

    Silence beyond half a second goes on either side; with a `chunk` (tokens) also as much of the rest, down to 0.1 s, as
    makes the prompt the one that is fed again the least; of equals the longest.
    """
    seconds = num_samples / rate_hz
    lead, trail = measures.first_speech, seconds - measures.end_speech
    start, end = max(lead - _MAX_PAUSE_SECONDS, 0.0), seconds - max(trail - _MAX_PAUSE_SECONDS, 0.0)
    spare_lead = max(min(lead, _MAX_PAUSE_SECONDS) - _KEPT_SECONDS, 0.0)
    spare_trail = max(min(trail, _MAX_PAUSE_SECONDS) - _KEPT_SECONDS, 0.0)
    if chunk is not None:
        longest = int((end - start) * TOKENS_PER_SECOND + 1e-6)
        shortest = math.ceil((end - start - spare_lead - spare_trail) * TOKENS_PER_SECOND - 1e-6)
        lengths = range(longest, min(shortest, longest) - 1, -1)
        best = min(lengths, key=lambda length: num_fed_again(length, chunk, lookahead))
        if num_fed_again(best, chunk, lookahead) < num_fed_again(longest, chunk, lookahead):
            excess = end - start - best / TOKENS_PER_SECOND
            end -= min(excess, spare_trail)
            start += max(excess - spare_trail, 0.0)
    first = round(start * rate_hz)
    # Upwards, so that rounding never loses the last token.
    return Cut(start=first, end=min(first + math.ceil((end - start) * rate_hz - 1e-6), num_samples))
