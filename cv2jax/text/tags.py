"""CosyVoice 2's special tokens in a text: sounds, marked spans, and the prefix that steers a voice.

A prefix is everything up to `<|endofprompt|>`: an instruction ("Speak softly."), or the speaker of a multi-speaker
fine-tuning ("Speaker A", "unknown"). These are strings only; ids belong to the checkpoint's tokenizer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Integer

from cv2jax.config import UserError

END_OF_TEXT = "<|endoftext|>"  # both end and padding of the text tokenizer
END_OF_PROMPT = "<|endofprompt|>"

# In the order in which the official tokenizer adds them, hence the order of their ids in a Qwen2 vocabulary.
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    END_OF_PROMPT,
    "[breath]",
    "<strong>",
    "</strong>",
    "[noise]",
    "[laughter]",
    "[cough]",
    "[clucking]",
    "[accent]",
    "[quick_breath]",
    "<laughter>",
    "</laughter>",
    "[hissing]",
    "[sigh]",
    "[vocalized-noise]",
    "[lipsmack]",
    "[mn]",
)
SOUND_TAGS = tuple(token for token in SPECIAL_TOKENS if token.startswith("["))
SPAN_TAGS = (("<strong>", "</strong>"), ("<laughter>", "</laughter>"))
TAGS = (*SOUND_TAGS, *(tag for pair in SPAN_TAGS for tag in pair))

_TAG = re.compile("|".join(map(re.escape, TAGS)))
_CONTROL = re.compile(r"<\|[^<|>]*\|>")
_SPEAKER = re.compile(r"Speaker (\S+)")
_UNKNOWN_SPEAKER = "unknown"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text that is either one whole tag or free of tags."""

    text: str
    is_tag: bool


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What stands before `<|endofprompt|>`: an instruction, a speaker's name, or an unknown speaker (content empty)."""

    kind: Literal["instruct", "speaker", "unknown_speaker"]
    content: str


def split_tags(text: str) -> list[Segment]:
    """Cut a text into tags and what lies between them; joined, the segments are the text (spec official 2.3)."""
    return list(_iterate_segments(text))


def _iterate_segments(text: str) -> Iterator[Segment]:
    end = 0
    for match in _TAG.finditer(text):
        if match.start() > end:
            yield Segment(text[end : match.start()], is_tag=False)
        yield Segment(match.group(), is_tag=True)
        end = match.end()
    if end < len(text):
        yield Segment(text[end:], is_tag=False)


def check_tags(text: str) -> None:
    """Raise UserError for an unpaired `<strong>` or `<laughter>`, a `<|…|>` that is no prefix mark, or a second prefix.

    Other words in brackets are ordinary text: nobody can tell a misspelt tag from an aside. The official code checks
    nothing, and a misspelt `<|…|>` is read out loud.
    """
    controls = _CONTROL.findall(text)
    for control in controls:
        if control != END_OF_PROMPT:
            raise UserError(f"text: {control} does not belong in a text; only {END_OF_PROMPT} does")
    if len(controls) > 1:
        raise UserError(f"text: {END_OF_PROMPT} stands {len(controls)} times; a text has one prefix at most")
    for opening, closing in SPAN_TAGS:
        _check_span(text, opening, closing)


def _check_span(text: str, opening: str, closing: str) -> None:
    """Raise UserError unless the pair's tags alternate, opening first and closing last."""
    is_open = False
    for match in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if (match.group() == opening) == is_open:
            fault = "is opened inside another" if is_open else "was not opened before"
            raise UserError(f"text: {match.group()} at character {match.start()} {fault}")
        is_open = not is_open
    if is_open:
        raise UserError(f"text: {opening} is never closed by {closing}")


def build_instruct_prefix(instruction: str) -> str:
    """The prefix of an instruction, which stays as given; a mark that already ends it is not repeated (spec 2.4).

    Raises UserError for an instruction that is blank, holds other control tokens or would be read as a speaker.
    """
    instruction = instruction.removesuffix(END_OF_PROMPT)
    if not instruction.strip():
        raise UserError("instruction: it is empty; leave the prefix out instead")
    if "<|" in instruction or "|>" in instruction:
        raise UserError(f"instruction {instruction[:40]!a}: control tokens (<|…|>) do not belong in it")
    if _parse_prefix(instruction).kind != "instruct":
        raise UserError(f"instruction {instruction[:40]!a}: it reads as a speaker prefix; word it otherwise")
    return instruction + END_OF_PROMPT


def build_speaker_prefix(speaker: str | None) -> str:
    """The prefix of multi-speaker fine-tuning: `Speaker A<|endofprompt|>`, or `unknown<|endofprompt|>` without a name.

    Raises UserError for a name that is empty, has white space or holds control tokens (spec paper, section 1.7).
    """
    if speaker is None:
        return _UNKNOWN_SPEAKER + END_OF_PROMPT
    if not re.fullmatch(r"\S+", speaker) or "<|" in speaker or "|>" in speaker:
        raise UserError(f"speaker {speaker[:40]!a}: a name in a prefix is one word without control tokens")
    return f"Speaker {speaker}{END_OF_PROMPT}"


def split_prefix(text: str) -> tuple[Prefix | None, str]:
    """Take a text apart into its prefix, None if it has none, and the words to speak; the inverse of the builders.

    Raises UserError if the prefix mark stands more than once.
    """
    before, mark, after = text.partition(END_OF_PROMPT)
    if not mark:
        return None, text
    if END_OF_PROMPT in after:
        raise UserError(
            f"text: {END_OF_PROMPT} stands {text.count(END_OF_PROMPT)} times; a text has one prefix at most"
        )
    return _parse_prefix(before), after


def split_prefix_tokens(
    tokens: Integer[np.ndarray, " T"], end_of_prompt: int
) -> tuple[Integer[np.ndarray, " T_prefix"], Integer[np.ndarray, " T_text"]]:
    """Tokens up to and with the last `end_of_prompt` (the id of END_OF_PROMPT), and those to speak behind it."""
    ends = np.flatnonzero(tokens == end_of_prompt)
    start = int(ends[-1]) + 1 if len(ends) else 0
    return tokens[:start], tokens[start:]


def _parse_prefix(before: str) -> Prefix:
    if before == _UNKNOWN_SPEAKER:
        return Prefix("unknown_speaker", "")
    speaker = _SPEAKER.fullmatch(before)
    return Prefix("speaker", speaker[1]) if speaker else Prefix("instruct", before)
