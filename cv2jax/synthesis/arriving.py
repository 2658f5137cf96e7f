"""Cuts text that is still arriving into pieces that a language model can speak, the same pieces for any pushes."""

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from cv2jax.text.split import is_speechless

_TERMINATORS = frozenset("。？！；.?!;।۔؟؛｡\n")
_CLOSERS = frozenset("\"'”’)）」』")  # belong to the clause that they close
# Text tokens, as where whole text is split: from there on a piece ends with a clause, and with a word; a word of more is cut.
_SHORTEST, _LONGEST = 60, 160
_UNIT = 16  # characters that are counted together; all tags are shorter
_FIRST_WORDLESS = "\u0e00"  # Thai, and most scripts behind it, write no blanks between words
_LONGEST_TAG = 24  # characters; what is longer is no tag


class _Extent(NamedTuple):
    """How long a piece is. Tokens come late, so it is counted in units of characters that are the same for any pushes."""

    num_tokens: int = 0  # of its whole units
    num_before_word: int = 0  # of these, in front of the last word
    unit: str = ""  # what comes behind them

    def add(self, character: str, is_mark: bool, count: Callable[[str], int]) -> "_Extent":
        """With the next character, behind which a unit ends where it `is_mark`."""
        num_tokens, num_before_word, unit = self
        is_blank = character.isspace()
        if unit and (character in "<[" or (is_blank and not unit[-1].isspace())):
            num_tokens, unit = num_tokens + count(unit), ""
        if is_blank:
            num_before_word = num_tokens
        unit += character
        if is_mark or len(unit) >= _UNIT:
            num_tokens, unit = num_tokens + count(unit), ""
        return _Extent(num_tokens, num_before_word, unit)


class ArrivingPieces:
    """Where pieces of a text end; the text is neither normalised nor changed, but for blanks in front of a piece.

    A piece ends behind the first clause once it is about 60 tokens long, and behind the first word at 160. A word of more is
    cut where it is that long, but neither in a tag nor in front of a mark on a character, unless it is twice as long. What
    has nothing to speak goes with the words behind it; it is dropped where a piece of nothing else ends, or the text.
    """

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        """`count_tokens`: the text tokens of a text."""
        self._count = count_tokens
        # Of the piece: how long it is, whether it has words, what is there before the first of them.
        self._extent, self._begun, self._lead = _Extent(), False, ""
        self._held, self._previous, self._is_ending = "", "", False  # a mark whose meaning hangs on what follows it
        self._in_tag = 0  # characters of what may be a tag

    def push(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether the piece ends behind it) in order."""
        text, start, found = self._held + text, 0, []
        self._held = ""
        for i, character in enumerate(text):
            if self._is_too_long(character):
                found += self._part(text[start:i], True)
                start = i
            is_mark = character in _TERMINATORS or (self._is_ending and character in _CLOSERS)
            extent = self._extent.add(character, is_mark, self._count)
            may_end, ends = is_mark and extent.num_tokens >= _SHORTEST, False
            if may_end and i + 1 == len(text):
                self._held, text = character, text[:i]
                break
            if may_end:
                following = text[i + 1]
                joins = self._previous.isdecimal() and following.isdecimal()  # 3.5
                ends = not joins and following not in _TERMINATORS and following not in _CLOSERS
            self._extent, self._previous, self._is_ending = extent, character, is_mark
            self._follow_tag(character)
            if ends:
                found += self._part(text[start : i + 1], True)
                start = i + 1
        return found + self._part(text[start:], False)

    def end(self) -> list[tuple[str, bool]]:
        """As `push`, of what is still held; the piece ends behind it, and is dropped where it has no words."""
        held, self._held = self._held, ""
        return self._part(held, True)

    def flush(self) -> list[tuple[str, bool]]:
        """As `push`, of what is still held when the text has ended."""
        held, self._held = self._held, ""
        return self._part(held, False)

    def _is_too_long(self, following: str) -> bool:
        """Whether the piece ends in front of a character without an end of a clause."""
        num_tokens, num_before_word, _ = self._extent
        if num_tokens < _LONGEST:
            return False
        num_of_word = num_tokens - num_before_word
        if num_of_word >= 2 * _LONGEST:
            return True
        if unicodedata.category(following)[0] == "M" or (self._in_tag and following not in "<["):
            return False
        return self._previous.isspace() or self._previous >= _FIRST_WORDLESS or num_of_word >= _LONGEST

    def _follow_tag(self, character: str) -> None:
        if character in "<[":
            self._in_tag = 1
        elif self._in_tag:
            self._in_tag = 0 if character in ">]" or self._in_tag >= _LONGEST_TAG else self._in_tag + 1

    def _part(self, text: str, ends: bool) -> list[tuple[str, bool]]:
        if ends:
            self._extent, self._is_ending = _Extent(), False
        if not self._begun:
            if is_speechless(text):  # no more is looked at than came: the lead has no words either
                self._lead = "" if ends else self._lead + text
                return []
            text, self._lead = (self._lead + text).lstrip(), ""
        self._begun = not ends
        return [(text, ends)] if text or ends else []
