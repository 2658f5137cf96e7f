"""Error rates of recognised text, by Levenshtein distance over normalised transcripts."""

import dataclasses
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """Counts over a set of utterances; rates are corpus rates (sum of errors over sum of reference lengths)."""

    num_utterances: int
    character_errors: int
    num_characters: int
    word_errors: int
    num_words: int
    num_exact: int  # utterances without any error

    @property
    def character_error_rate(self) -> float:
        """Errors a reference character; may exceed 1."""
        return self.character_errors / max(self.num_characters, 1)

    @property
    def word_error_rate(self) -> float:
        """Errors a reference word; may exceed 1."""
        return self.word_errors / max(self.num_words, 1)

    @property
    def word_accuracy(self) -> float:
        """1 − word error rate, not below 0."""
        return max(0.0, 1.0 - self.word_error_rate)


def error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Compares pairs of normalised texts; words are split at spaces, so unspaced scripts count an utterance as one word.

    An utterance with an empty reference counts every recognised character as an error.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    pairs = list(zip(references, hypotheses, strict=True))
    return ErrorRate(
        num_utterances=len(pairs),
        character_errors=sum(Levenshtein.distance(r, h) for r, h in pairs),
        num_characters=sum(len(r) for r in references),
        word_errors=sum(Levenshtein.distance(r.split(), h.split()) for r, h in pairs),
        num_words=sum(len(r.split()) for r in references),
        num_exact=sum(r == h for r, h in pairs),
    )
