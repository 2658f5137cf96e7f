"""Characters as recognition targets: transcript normalisation and the vocabulary of the tokenizer's ASR decoder."""

import dataclasses
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from cv2jax.config import UserError

PAD_ID = 0  # also the CTC blank
SOS_ID = 1
EOS_ID = 2
UNKNOWN_ID = 3
NUM_SPECIAL = 4
_APOSTROPHES = {"’": "'", "‘": "'", "`": "'", "´": "'"}
BASIC_LATIN = " 'abcdefghijklmnopqrstuvwxyz"  # always in the vocabulary: a small corpus need not show every letter


def normalize_transcript(text: str) -> str:
    """Text as error rates count it: NFKC, case folded, punctuation and symbols dropped, spaces single.

    Letters, digits and marks of every script stay, and the apostrophe inside a word. No number is spelled out: an
    unknown language is left alone.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = []
    for character in folded:
        character = _APOSTROPHES.get(character, character)
        kept.append(character if character == "'" or unicodedata.category(character)[0] in "LNM" else " ")
    words = (word.strip("'") for word in "".join(kept).split())
    return " ".join(word for word in words if word)


@dataclasses.dataclass(frozen=True)
class CharacterVocabulary:
    """Characters in a fixed order; id 0 pad and CTC blank, 1 start, 2 end, 3 unknown, then the characters."""

    characters: tuple[str, ...]
    _ids: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    @classmethod
    def from_counts(cls, counts: Iterable[str]) -> "CharacterVocabulary":
        """The vocabulary of a split: its characters and basic Latin, sorted by code point."""
        return cls(tuple(sorted(set(counts) | set(BASIC_LATIN))))

    @classmethod
    def from_json(cls, values: object, place: str) -> "CharacterVocabulary":
        """From a JSON list of single characters; raises UserError naming `place` otherwise."""
        if (
            not isinstance(values, list)
            or not all(isinstance(c, str) and len(c) == 1 for c in values)
            or len(set(values)) < len(values)
        ):
            raise UserError(f"vocabulary {place}: expected a JSON list of distinct single characters")
        return cls(tuple(values))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {c: i + NUM_SPECIAL for i, c in enumerate(self.characters)})

    @property
    def size(self) -> int:
        """Number of ids, special ones included."""
        return NUM_SPECIAL + len(self.characters)

    def missing(self, text: str) -> str:
        """Characters of the normalised text that the vocabulary lacks, sorted."""
        return "".join(sorted(set(normalize_transcript(text)) - set(self.characters)))

    def encode(self, text: str | None) -> np.ndarray:
        """Ids [T] int32 of the normalised text, without start and end; an unknown character becomes `UNKNOWN_ID`."""
        return np.array([self._ids.get(c, UNKNOWN_ID) for c in normalize_transcript(text or "")], np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ids up to the first end; unknown shows as U+FFFD, pad and start are dropped."""
        out: list[str] = []
        for i in ids:
            if i == EOS_ID:
                break
            if i >= NUM_SPECIAL:
                out.append(self.characters[i - NUM_SPECIAL])
            elif i == UNKNOWN_ID:
                out.append("\N{REPLACEMENT CHARACTER}")
        return "".join(out)
