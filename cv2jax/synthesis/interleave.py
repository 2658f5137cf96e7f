"""What a request feeds next and how many tokens it draws then: a pure state machine over token ids.

`init`, `push_text`, `flush`, `step` lay out what the training's `build_row` does, prompt text in front of the text and prompt
speech in front of what is drawn:

    [sos] (N text, M speech)… rest of the text [task] rest of the speech

`fill` is predicted where a full group ends and never fed, so it is not drawn either: there the machine waits for text.
Prompt speech fills groups before anything is drawn, and what the text leaves over of it goes behind [task] (none of
the defects Q1 to Q3 of spec/official.md 9). Without a ratio there are no groups: the whole text comes first.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from cv2jax.text.layout import MIX_RATIO, SOS, SPECIAL, SPEECH, TASK, TEXT, Ratio, check_ratio

NO_LIMIT = np.iinfo(np.int32).max

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a request stands in its layout."""

    ratio: Ratio | None  # None: the whole text first
    text: Tokens  # pushed, not fed
    prompt_speech: Tokens  # not fed
    begun: bool = False  # sos is fed
    missing: int = 0  # speech tokens until the group is full; 0 between groups
    flushed: bool = False  # no more text comes
    in_tail: bool = False  # task is fed


@dataclasses.dataclass(frozen=True)
class Step:
    """What comes next: feed these, then draw so many speech tokens (0: wait for text; in the tail until eos)."""

    tokens: Tokens
    kinds: Tokens
    num_draws: int
    in_tail: bool


def init(
    prompt_text: Iterable[int] = (), prompt_speech: Iterable[int] = (), ratio: Ratio | None = MIX_RATIO
) -> Progress:
    """A request that has fed nothing; UserError for a ratio that is not positive."""
    if ratio is not None:
        check_ratio(ratio)
    return Progress(ratio=ratio, text=tuple(prompt_text), prompt_speech=tuple(prompt_speech))


def push_text(progress: Progress, tokens: Iterable[int]) -> Progress:
    """Appends text; ValueError behind `flush`."""
    if progress.flushed:
        raise ValueError("text behind the flush of a request")
    return dataclasses.replace(progress, text=progress.text + tuple(tokens))


def flush(progress: Progress) -> Progress:
    """Says that no more text comes."""
    return dataclasses.replace(progress, flushed=True)


def step(progress: Progress, num_drawn: int = 0) -> tuple[Progress, Step]:
    """What to do next, after `num_drawn` of the speech tokens last asked for were drawn (and fed).

    Feeds all that can be fed before the next draw. How the text was cut into pushes does not change the sequence.
    """
    if progress.in_tail:
        return progress, Step((), (), NO_LIMIT, True)
    text, prompt, missing = progress.text, progress.prompt_speech, progress.missing - num_drawn
    if missing < 0:
        raise ValueError(f"{num_drawn} tokens were drawn where the group lacked {progress.missing}")
    num_text, num_speech = progress.ratio or (NO_LIMIT, 0)
    fed: list[tuple[int, int]] = []
    while True:
        now, prompt = prompt[:missing], prompt[missing:]
        fed += [(token, SPEECH) for token in now]
        missing -= len(now)
        if missing or len(text) < num_text:
            break
        fed += [(token, TEXT) for token in text[:num_text]]
        text, missing = text[num_text:], num_speech
    in_tail = not missing and progress.flushed
    if in_tail:
        fed += [(token, TEXT) for token in text] + [(TASK, SPECIAL)] + [(token, SPEECH) for token in prompt]
        text, prompt = (), ()
    begun = progress.begun or bool(fed)
    if begun and not progress.begun:
        fed.insert(0, (SOS, SPECIAL))
    after = dataclasses.replace(
        progress, text=text, prompt_speech=prompt, begun=begun, missing=missing, in_tail=in_tail
    )
    tokens, kinds = tuple(token for token, _ in fed), tuple(kind for _, kind in fed)
    return after, Step(tokens, kinds, NO_LIMIT if in_tail else missing, in_tail)
