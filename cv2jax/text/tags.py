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

from cv2jax.config import UserError
from cv2jax.shapes import Integer

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
_BEGUN = re.compile(r"<(?:\|[^<|>]*\|?|/?[a-z]*)\Z")  # what a control token or a tag of a span may begin with
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagState:
    """What the check of a text that is still arriving remembers of it.

    Attributes:
      num_checked: characters that are done with. held: what lies behind them, of a tag that may have begun.
      num_prefixes: END_OF_PROMPT so far. opened: tags of SPAN_TAGS that are open.
    """

    num_checked: int = 0
    held: str = ""
    num_prefixes: int = 0
    opened: frozenset[str] = frozenset()


def check_tags(text: str) -> None:
    """Raise UserError for an unpaired `<strong>` or `<laughter>`, a `<|…|>` that is no prefix mark, or a second prefix.

    Other words in brackets are ordinary text: nobody can tell a misspelt tag from an aside. The official code checks
    nothing, and a misspelt `<|…|>` is read out loud.
    """
    check_tags_closed(check_more_tags(TagState(), text))


def check_more_tags(state: TagState, text: str) -> TagState:
    """`check_tags` of the next piece of a text, of any length: the state behind it; spans may still be open.

    Raises UserError as soon as no later piece can mend the text, a tag that is cut by pieces included.
    """
    text = state.held + text
    controls = _CONTROL.findall(text)
    for control in controls:
        if control != END_OF_PROMPT:
            raise UserError(f"text: {control} does not belong in a text; only {END_OF_PROMPT} does")
    num_prefixes, opened = state.num_prefixes + len(controls), state.opened
    if num_prefixes > 1:
        raise UserError(f"text: {END_OF_PROMPT} stands {num_prefixes} times; a text has one prefix at most")
    for opening, closing in SPAN_TAGS:
        opened = _check_span(text, opening, closing, opened, state.num_checked)
    begun = _BEGUN.search(text)
    end = begun.start() if begun else len(text)
    return TagState(
        num_checked=state.num_checked + end, held=text[end:], num_prefixes=num_prefixes, opened=frozenset(opened)
    )


def check_tags_closed(state: TagState) -> None:
    """Raise UserError where a span is open at the end of a text."""
    for opening, closing in SPAN_TAGS:
        if opening in state.opened:
            raise UserError(f"text: {opening} is never closed by {closing}")


def _check_span(text: str, opening: str, closing: str, opened: frozenset[str], start: int) -> frozenset[str]:
    """What is open behind a text from character `start` on; UserError unless the pair's tags alternate."""
    is_open = opening in opened
    for match in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if (match.group() == opening) == is_open:
            fault = "is opened inside another" if is_open else "was not opened before"
            raise UserError(f"text: {match.group()} at character {start + match.start()} {fault}")
        is_open = not is_open
    return opened | {opening} if is_open else opened - {opening}


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
