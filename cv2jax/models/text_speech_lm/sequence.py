"""The training layout: how an utterance's text and speech tokens interleave into one row (spec/official.md 3.3).

Whole text (unistream):   [sos] text… [task] speech…
Arriving text (bistream): [sos] (N text, M speech)… rest of the text [task] rest of the speech

Unistream is bistream with no full group, so one arithmetic places both. Every position predicts the speech token behind
it; the last one of a full group predicts `fill` (give me more text), the last one of the row `eos`. Neither is ever an
input. An instruction or a speaker prefix is text like any other: the caller puts its tokens in front.

P = T + L + 2 is the length of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int32, Integer

from cv2jax.config import UserError
from cv2jax.text.layout import (
    MIX_RATIO,
    SOS,
    SPECIAL,
    SPEECH,
    TASK,
    TEXT,
    Ratio,
    check_ratio,
    check_token_ids,
    row_length,
)

# Neither flax nor jax here: the processes of a loader lay out rows too.
NUM_SPECIAL = 2  # sos, task
NUM_STOPS = 3  # eos, an id that no official code uses, fill: behind the speech tokens
IGNORE = -1  # a target that does not count
BISTREAM_SHARE = 0.5  # of the utterances that have speech enough


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One utterance laid out for the model."""

    token: Int32[np.ndarray, " P"]  # input, a row of the table that `kind` names
    kind: Int32[np.ndarray, " P"]  # SPECIAL, TEXT or SPEECH
    targets: Int32[np.ndarray, " P"]  # the speech token or stop that follows each input; IGNORE inside the text

    def __len__(self) -> int:
        """P."""
        return len(self.token)


def eos_id(num_speech_tokens: int) -> int:
    """The stop that ends an utterance, for a speech vocabulary of S = `num_speech_tokens` (spec/official.md 3.1)."""
    return num_speech_tokens


def fill_id(num_speech_tokens: int) -> int:
    """The stop that asks for the next N text tokens; S + 1 before it is unused (spec/official.md 3.1)."""
    return num_speech_tokens + 2


def stop_ids(num_speech_tokens: int) -> tuple[int, ...]:
    """All outputs that are no speech: eos, the unused one and fill (spec/official.md 3.1, `stop_token_ids`)."""
    return tuple(range(num_speech_tokens, num_speech_tokens + NUM_STOPS))


def is_bistream(
    coin: float | Float[np.ndarray, "*B"],
    num_text: int | Integer[np.ndarray, "*B"],
    num_speech: int | Integer[np.ndarray, "*B"],
    ratio: Ratio = MIX_RATIO,
) -> Bool[np.ndarray, "*B"]:
    """True where coin < 0.5 and L / T > M / N, both strictly; the coin is uniform in [0, 1) (llm/llm.py:302-349).

    Works on numbers and on columns of them. With L / T > M / N every full group of text finds its M speech tokens.
    Raises UserError for a ratio that is not positive.
    """
    num_group_text, num_group_speech = check_ratio(ratio)
    # Upstream divides int32 tensors, which gives float32. Rounding keeps order: what is > here is > exactly.
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty text is for build_row to report
        speech_per_text = np.asarray(num_speech, np.float32) / np.asarray(num_text, np.float32)
    enough = speech_per_text > np.float32(num_group_speech / num_group_text)
    return np.asarray((np.asarray(coin) < BISTREAM_SHARE) & enough)


def build_row(
    text_tokens: Integer[np.ndarray, " T"],
    speech_tokens: Integer[np.ndarray, " L"],
    *,
    bistream: bool | np.bool_,
    text_vocabulary_size: int,
    num_speech_tokens: int,
    ratio: Ratio = MIX_RATIO,
    max_length: int | None = None,
    name: str = "utterance",
) -> Row:
    """Lays out text [T] and speech [L] as one row [P] (llm/llm.py:302-349, spec/official.md 3.3).

    S = `num_speech_tokens` is the codebook's size, `max_length` the most positions a row may have, `name` what errors
    call the utterance. Raises UserError for tokens outside their vocabulary, empty text, a row longer than the cap,
    and for bistream with fewer than M speech tokens to a full group of N text tokens.
    """
    num_text, num_speech, num_groups = len(text_tokens), len(speech_tokens), 0
    check_token_ids(f"{name}: text token", text_tokens, text_vocabulary_size)
    check_token_ids(f"{name}: speech token", speech_tokens, num_speech_tokens)
    num_group_text, num_group_speech = check_ratio(ratio)
    if bistream:
        num_groups = num_text // num_group_text
    _check_lengths(name, num_text, num_speech, num_groups * num_group_speech, ratio, max_length)

    text, speech = np.arange(num_text), np.arange(num_speech)
    text_at = 1 + text + num_group_speech * np.minimum(text // num_group_text, num_groups)
    group = speech // num_group_speech
    speech_at = 1 + speech + np.where(group < num_groups, num_group_text * (group + 1), num_text + 1)
    task_at = 1 + num_text + num_group_speech * num_groups
    fill_at = (num_group_text + num_group_speech) * np.arange(1, num_groups + 1)  # the last position of each full group

    length = int(row_length(num_text, num_speech))
    token, kind = np.zeros((2, length), np.int32)
    targets = np.full(length, IGNORE, np.int32)
    token[0], token[task_at] = SOS, TASK
    kind[0] = kind[task_at] = SPECIAL
    token[text_at], kind[text_at] = text_tokens, TEXT
    token[speech_at], kind[speech_at] = speech_tokens, SPEECH
    targets[speech_at - 1] = speech_tokens
    targets[fill_at] = fill_id(num_speech_tokens)
    targets[-1] = eos_id(num_speech_tokens)
    return Row(token, kind, targets)


@runtime_checkable
class Tokens(Protocol):
    """An utterance as a loader reads it."""

    @property
    def id(self) -> str:
        """What errors call it."""
        ...

    @property
    def text_tokens(self) -> np.ndarray:
        """[T]"""
        ...

    @property
    def speech_tokens(self) -> np.ndarray:
        """[L]"""
        ...


def build_mixed_row(
    utterance: Tokens,
    coin: float,
    *,
    text_vocabulary_size: int,
    num_speech_tokens: int,
    ratio: Ratio,
    max_length: int,
) -> Row:
    """`build_row` of an utterance: interleaved where its coin says so (`is_bistream`), else the whole text first."""
    text, speech = utterance.text_tokens, utterance.speech_tokens
    return build_row(
        text,
        speech,
        bistream=bool(is_bistream(coin, len(text), len(speech), ratio)),
        text_vocabulary_size=text_vocabulary_size,
        num_speech_tokens=num_speech_tokens,
        ratio=ratio,
        max_length=max_length,
        name=f"utterance {utterance.id!r}",
    )


def collate(rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
    """Right-pads rows to one static length: `token kind targets` int32 [B P] and `num_tokens` int32 [B].

    Padding repeats sos, has no target, and lies behind every real position, where a causal mask hides it. Raises
    UserError for a row that does not fit.
    """
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("token", "kind")}
    batch["targets"] = np.full((len(rows), length), IGNORE, np.int32)
    batch["num_tokens"] = np.array([len(row) for row in rows], np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(f"row {i} of the batch has {len(row)} positions, the batch only {length}; raise its length")
        for name in ("token", "kind", "targets"):
            batch[name][i, : len(row)] = getattr(row, name)
    return batch


def _check_lengths(
    name: str, num_text: int, num_speech: int, num_needed: int, ratio: Ratio, max_length: int | None
) -> None:
    if num_text == 0:
        raise UserError(f"{name}: has no text tokens; leave utterances without a transcript out")
    if num_speech < num_needed:
        raise UserError(
            f"{name}: {num_speech} speech tokens are too few to interleave {num_text} text tokens"
            f" {ratio[0]}:{ratio[1]}, which takes {num_needed}; lay it out with the whole text first"
        )
    length = int(row_length(num_text, num_speech))
    if max_length is not None and length > max_length:
        raise UserError(
            f"{name}: {num_text} text and {num_speech} speech tokens make a row of {length}, more than {max_length};"
            " raise the cap or leave long utterances out"
        )
