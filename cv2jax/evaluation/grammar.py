"""What pocketsphinx hears in speech of a slot grammar: an independent judge of how well synthesised speech is understood.

It chooses among the sentences of a JSGF grammar (`cv2jax corpus` writes one), so it says nothing of other texts; and of
the voices of espeak-ng its acoustic model understands some (f2, f3, f5, m2, caleb …: spec/frontends.md 4), so the error on
the original recordings belongs beside every figure.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein

from cv2jax.audio.io import to_int16
from cv2jax.audio.resample import resample
from cv2jax.config import UserError
from cv2jax.text.characters import normalize_transcript

_RATE_HZ = 16000  # of the acoustic model in the package
_RULE = re.compile(r"^\s*(public\s+)?<(\w+)>\s*=\s*([^;]+);", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeardWords:
    """Word errors of what was heard; `chance_…` are those of guessing a sentence of the grammar, slot by slot."""

    num_utterances: int
    num_words: int
    word_errors: int
    num_slot_words: int
    slot_word_errors: int
    num_exact: int
    chance_slot_word_error_rate: float

    @property
    def word_error_rate(self) -> float:
        """Errors a reference word."""
        return self.word_errors / max(self.num_words, 1)

    @property
    def slot_word_error_rate(self) -> float:
        """Errors a reference word that the grammar has a choice of."""
        return self.slot_word_errors / max(self.num_slot_words, 1)

    def metrics(self) -> dict[str, float | int]:
        """The rates and counts, as metrics.json has them."""
        return {
            "word_error_rate": self.word_error_rate,
            "slot_word_error_rate": self.slot_word_error_rate,
            "chance_slot_word_error_rate": self.chance_slot_word_error_rate,
            "num_heard": self.num_utterances,
            "num_exact": self.num_exact,
            "num_words": self.num_words,
        }


class GrammarRecogniser:
    """pocketsphinx with a JSGF grammar, its English acoustic model and dictionary; loads in a second.

    Raises UserError where pocketsphinx is not installed, and for a grammar that cannot be read or that it refuses.
    """

    def __init__(self, grammar: str | os.PathLike[str]) -> None:
        path = pathlib.Path(grammar)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this grammar ({error})") from None
        self._slots, self._pattern = _parse(text, path)
        try:
            import pocketsphinx
        except ImportError:
            raise UserError("the recogniser needs pocketsphinx: pip install 'cv2jax[judges]'") from None
        try:
            # A loglevel of FATAL: it would tell its whole configuration on stderr.
            self._decoder = pocketsphinx.Decoder(lm=None, jsgf=str(path), samprate=_RATE_HZ, loglevel="FATAL")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: pocketsphinx cannot use this grammar ({error})") from None

    def covers(self, text: str) -> bool:
        """Whether a text is one of the grammar's sentences, capitals and punctuation aside."""
        return self._pattern.fullmatch(_words(text)) is not None

    def read(self, waveform: Float[np.ndarray, " W"], rate_hz: int) -> str:
        """The words heard in a waveform in [-1, 1], "" where it hears no sentence of the grammar (silence, noise)."""
        samples = to_int16(np.nan_to_num(resample(waveform, rate_hz, _RATE_HZ)))
        if not samples.any():
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found is not None else ""

    def judge(self, references: Sequence[str], heard: Sequence[str]) -> HeardWords:
        """Word errors of what was heard against what was said; only sentences that the grammar `covers` can be judged.

        A slot word counts as wrong where the alignment of the two sentences replaces or drops it. Raises ValueError for a
        reference that is no sentence of the grammar.
        """
        counts = dict.fromkeys(("num_words", "word_errors", "num_slot_words", "slot_word_errors", "num_exact"), 0)
        chances: list[float] = []
        for reference, hypothesis in zip(references, heard, strict=True):
            match = self._pattern.fullmatch(_words(reference))
            if match is None:
                raise ValueError(f"{reference!r} is no sentence of the grammar")
            words, slots = _words(reference).split(), self._slot_places(match)
            edits = Levenshtein.editops(words, hypothesis.split())
            counts["num_words"] += len(words)
            counts["word_errors"] += len(edits)
            counts["num_slot_words"] += len(slots)
            counts["slot_word_errors"] += sum(e.tag != "insert" and e.src_pos in slots for e in edits)
            counts["num_exact"] += not edits
            chances += slots.values()
        chance = float(np.mean(chances)) if chances else float("nan")
        return HeardWords(num_utterances=len(heard), **counts, chance_slot_word_error_rate=chance)

    def _slot_places(self, match: re.Match[str]) -> dict[int, float]:
        """{place of each slot word in the sentence: chance that a guess gets it wrong}; "the" of every place is no slot."""
        places: dict[int, float] = {}
        for name, choices in self._slots.items():
            first = len(match.string[: match.start(name)].split())
            for place, word in enumerate(match[name].split()):
                same = sum(c.split()[place : place + 1] == [word] for c in choices)
                if same < len(choices):
                    places[first + place] = 1 - same / len(choices)
        return places


def _parse(text: str, path: pathlib.Path) -> tuple[dict[str, list[str]], re.Pattern[str]]:
    """(the choices of each slot, a pattern of the sentences with a group a slot); UserError for another kind of grammar."""
    rules = {name: [" ".join(choice.split()) for choice in body.split("|")] for _, name, body in _RULE.findall(text)}
    public = [name for is_public, name, _ in _RULE.findall(text) if is_public]
    if text.startswith("#JSGF") and len(public) == 1 and len(rules[public[0]]) == 1:
        [sentence] = rules.pop(public[0])
        parts = re.split(r"<(\w+)>", sentence)  # words, slot, words, slot … words
        slots, plain = parts[1::2], not any("<" in choice for choices in rules.values() for choice in choices)
        if slots and plain and set(slots) <= rules.keys():
            groups = (f"(?P<{name}>{'|'.join(map(re.escape, rules[name]))})" for name in slots)
            pieces = [
                re.escape(parts[0]),
                *(p for pair in zip(groups, map(re.escape, parts[2::2]), strict=True) for p in pair),
            ]
            return {name: rules[name] for name in slots}, re.compile("".join(pieces))
    raise UserError(f"{path}: not a JSGF grammar of one sentence with slots; give the grammar.jsgf of a corpus")


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^\w' ]", " ", normalize_transcript(text)).split())
