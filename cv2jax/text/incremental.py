"""The tokenizer for text that is still arriving: any chunking of a text gives the ids of the whole text.

A pure state machine, `init_incremental`, `push`, `flush`. Text is held back to a border that no later text can move:
- a special token may have begun (`[laugh`): all from there on waits;
- a later mark may join the last character (NFC): a border lies only before a character that joins nothing before it;
- of the words of Qwen2's pattern the last may grow, and white space at the end may be cut anew or run into a line break.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata

from cv2jax.text.tokenizer import IDEOGRAPH_PATTERN, TextTokenizer

_IDEOGRAPH = re.compile(IDEOGRAPH_PATTERN)
# Letters that join the one before them: Hangul vowels and finals, Kirat Rai vowels (Unicode 16).
_JOINING_LETTER = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff\U00016d40-\U00016d7f]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IncrementalState:
    """The end of the text so far whose ids are not settled yet."""

    held: str


def init_incremental() -> IncrementalState:
    """The state before any text."""
    return IncrementalState(held="")


def push(tokenizer: TextTokenizer, state: IncrementalState, text: str) -> tuple[IncrementalState, list[int]]:
    """Take the next piece of text, of any length; returns the new state and the ids [T] that became settled.

    The ids of all pushes and of the `flush` behind them are `tokenizer.encode` of the whole text.
    """
    held = state.held + text
    if _only_grows(tokenizer, state.held[-4:], text):
        return IncrementalState(held=held), []
    start, end = 0, len(held)  # of the plain text behind the last special token, up to where another may have begun
    for match in _special_pattern(tuple(tokenizer.added_ids)).finditer(held):
        if match["begun"] is not None:
            end = match.start()
            break
        start = match.end()
    ids = tokenizer.encode(held[:start])
    length, settled = _settle(tokenizer, held[start:end])
    return IncrementalState(held=held[start + length :]), ids + settled


def flush(tokenizer: TextTokenizer, state: IncrementalState) -> list[int]:
    """The ids [T] of what is still held when the text has ended."""
    return tokenizer.encode(state.held)


def _only_grows(tokenizer: TextTokenizer, tail: str, text: str) -> bool:
    """Whether text merely lengthens the last word, of one kind of character, which then need not be looked at again.

    It keeps the cost of a long word linear, whatever the pieces. Four characters are longer than a contraction, and
    than what of a special token follows its letters; to guess wrong would delay ids, never change them.
    """
    grown = tail + text
    if len(tail) < 4 or (tokenizer.single_chinese and _IDEOGRAPH.search(grown)):
        return False
    return grown.isalpha() or grown.isspace() or not any(c.isalnum() or c.isspace() for c in grown)


@functools.lru_cache(maxsize=8)
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Leftmost, longest special tokens; group `begun` is one that more text could complete or lengthen."""
    longest_first = sorted(tokens, key=len, reverse=True)
    begun = sorted({token[:i] for token in tokens for i in range(1, len(token))})
    return re.compile(rf"(?P<begun>(?:{'|'.join(map(re.escape, begun))})\Z)|{'|'.join(map(re.escape, longest_first))}")


def _settle(tokenizer: TextTokenizer, text: str) -> tuple[int, list[int]]:
    """How much of a plain text is settled whatever follows, in characters, and its ids."""
    normalized = tokenizer.normalize(text)
    words = tokenizer.pretokenize(normalized)
    before_blanks = len(normalized.rstrip())
    counts = {}  # settled words by the place where the last of them ends
    begin = 0
    for count, (_, end) in enumerate(words, start=1):
        if begin < before_blanks:
            counts[end] = count
        begin = end
    # From the end back to the last border that is one in the text as it came, too; the end itself is none.
    place, right = len(normalized), len(text)
    for left in reversed(range(1, len(text))):
        if _joins_previous(text[left]):
            continue
        place -= len(tokenizer.normalize(text[left:right]))
        right = left
        if place in counts:
            return left, [i for word, _ in words[: counts[place]] for i in tokenizer.encode_word(word)]
    return 0, []


def _joins_previous(character: str) -> bool:
    """Whether NFC may move or join a character to the one before; unknown and unassigned ones are taken to."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cn") or bool(_JOINING_LETTER.match(character))
