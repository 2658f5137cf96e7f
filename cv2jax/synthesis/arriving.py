"""Cuts text that is still arriving into pieces that a language model can speak, the same pieces for any pushes."""

import unicodedata

from cv2jax.text.split import is_speechless

_TERMINATORS = frozenset("。？！；.?!;।۔؟؛｡\n")
_CLOSERS = frozenset("\"'”’)）」』")  # belong to the clause that they close
# About so many text tokens: from there on a piece ends with a clause, with a word, with any character.
_SHORTEST, _LONGEST, _HARDEST = 60.0, 160.0, 320.0
_TOKENS_PER_CHARACTER = {True: 0.25, False: 0.7}  # about, of ASCII and of others: characters do not wait for tokens
_FIRST_WORDLESS = "\u0e00"  # Thai, and most scripts behind it, write no blanks between words
_LONGEST_TAG = 24  # characters; what is longer is no tag


class ArrivingPieces:
    """Where pieces of a text end; the text is neither normalised nor changed, but for blanks in front of a piece.

    A piece ends behind the first clause once it is about 60 tokens long, behind the first word at 160, and at 320 in the
    middle of one, but not in a tag. What has nothing to speak goes with the words behind it, and is dropped at the end.
    """

    def __init__(self) -> None:
        # Of the piece: how long it is, whether it has words, what is there before the first of them.
        self._length, self._begun, self._lead = 0.0, False, ""
        self._held, self._previous, self._is_ending = "", "", False  # a mark whose meaning hangs on what follows it
        self._in_tag = 0  # characters of what may be a tag

    def push(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether the piece ends behind it) in order."""
        text, start, found = self._held + text, 0, []
        self._held = ""
        for i, character in enumerate(text):
            number = _TOKENS_PER_CHARACTER[character.isascii()]
            length = self._length + number
            is_mark = character in _TERMINATORS or (self._is_ending and character in _CLOSERS)
            may_end = is_mark and length >= _SHORTEST
            if may_end and i + 1 == len(text):
                self._held, text = character, text[:i]
                break
            if length > _HARDEST and not self._in_tag and unicodedata.category(character)[0] != "M":
                found += self._part(text[start:i], True)
                start, length = i, number
            ends = length >= _LONGEST and (character.isspace() or character >= _FIRST_WORDLESS)
            if may_end:
                following = text[i + 1]
                joins = self._previous.isdecimal() and following.isdecimal()  # 3.5
                ends |= not joins and following not in _TERMINATORS and following not in _CLOSERS
            self._length, self._previous, self._is_ending = length, character, is_mark
            self._follow_tag(character)
            if ends:
                found += self._part(text[start : i + 1], True)
                start = i + 1
        return found + self._part(text[start:], False)

    def end(self) -> list[tuple[str, bool]]:
        """As `push`, of what is still held; the piece ends behind it. None where it has no words yet."""
        held, self._held = self._held, ""
        return self._part(held, self._begun)

    def flush(self) -> list[tuple[str, bool]]:
        """As `push`, of what is still held when the text has ended."""
        held, self._held = self._held, ""
        return self._part(held, False)

    def _follow_tag(self, character: str) -> None:
        if character in "<[":
            self._in_tag = 1
        elif self._in_tag:
            self._in_tag = 0 if character in ">]" or self._in_tag >= _LONGEST_TAG else self._in_tag + 1

    def _part(self, text: str, ends: bool) -> list[tuple[str, bool]]:
        if ends:
            self._length, self._is_ending = 0.0, False
        if not text:
            self._begun, was = self._begun and not ends, self._begun
            return [("", True)] if ends and was else []
        if not self._begun:
            self._lead += text
            if is_speechless(self._lead):
                return []
            text, self._lead = self._lead.lstrip(), ""
        self._begun = not ends
        return [(text, ends)]
