"""Cuts text that is still arriving into pieces that a language model can speak, the same pieces for any pushes."""

from cv2jax.text.split import is_speechless

_TERMINATORS = frozenset("。？！；.?!;।۔؟؛｡\n")
_CLOSERS = frozenset("\"'”’)）」』")  # belong to the clause that they close
_SHORTEST, _LONGEST = 60.0, 160.0  # about so many text tokens: from there on a piece ends with a clause, with a word
_TOKENS_PER_CHARACTER = {True: 0.25, False: 0.7}  # about, of ASCII and of others: characters do not wait for tokens


class ArrivingPieces:
    """Where pieces of a text end; the text is neither normalised nor changed, but for blanks in front of a piece.

    A piece ends behind the first clause once it is about 60 tokens long, or behind the first word at 160. What has nothing to
    speak goes with the words behind it, and is dropped at the end.
    """

    def __init__(self) -> None:
        self._length, self._begun, self._lead = (
            0.0,
            False,
            "",
        )  # of the piece; what is there of it before its first word
        self._held, self._previous, self._is_ending = "", "", False  # a mark whose meaning hangs on what follows it

    def push(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether the piece ends behind it) in order."""
        text, start, found = self._held + text, 0, []
        self._held = ""
        for i, character in enumerate(text):
            length = self._length + _TOKENS_PER_CHARACTER[character.isascii()]
            is_mark = character in _TERMINATORS or (self._is_ending and character in _CLOSERS)
            may_end = is_mark and length >= _SHORTEST
            if may_end and i + 1 == len(text):
                self._held, text = character, text[:i]
                break
            ends = length >= _LONGEST and (character.isspace() or not character.isascii())
            if may_end:
                following = text[i + 1]
                joins = self._previous.isdecimal() and following.isdecimal()  # 3.5
                ends |= not joins and following not in _TERMINATORS and following not in _CLOSERS
            self._length, self._previous, self._is_ending = length, character, is_mark
            if ends:
                found += self._part(text[start : i + 1], True)
                start = i + 1
        return found + self._part(text[start:], False)

    def flush(self) -> list[tuple[str, bool]]:
        """As `push`, of what is still held when the text has ended."""
        held, self._held = self._held, ""
        return self._part(held, False)

    def _part(self, text: str, ends: bool) -> list[tuple[str, bool]]:
        if ends:
            self._length, self._is_ending = 0.0, False
        if not text:
            return []
        if not self._begun:
            self._lead += text
            if is_speechless(self._lead):
                return []
            text, self._lead = self._lead.lstrip(), ""
        self._begun = not ends
        return [(text, ends)]
