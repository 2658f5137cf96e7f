"""What the embedded corpus shall say and in whose voice: its configuration and its endless, fixed sequence of utterances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cv2jax.config import UserError
from cv2jax.jobs.corpus_speakers import Speaker, list_speakers
from cv2jax.text.sentences import KINDS, LANGUAGES, SPLITS, list_kinds, list_split, order_sentences

MAX_HELD_OUT_SHARE = 0.5
_SHORT_UTTERANCE_SECONDS = 2.5  # an English sentence; the other languages' are longer


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What decides a corpus: hours in all, languages, voices a language, seed, share held out, weights of the kinds."""

    hours: float
    languages: tuple[str, ...] = ("en",)
    num_voices: int = 8
    seed: int = 0
    held_out_share: float = 0.05
    kinds: tuple[tuple[str, float], ...] = (("grammar", 1.0), ("free", 1.0))

    def validate(self) -> None:
        """Raise UserError for values that no corpus can have."""
        if not (math.isfinite(self.hours) and self.hours > 0):
            raise UserError(f"--hours {self.hours}: give a number of hours above 0, for example 0.5")
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages or len(set(self.languages)) < len(self.languages):
            named = unknown[0] if unknown else ",".join(self.languages)
            raise UserError(f"--languages {named!r}: choose from {','.join(LANGUAGES)}, each at most once")
        if not 0 < self.held_out_share <= MAX_HELD_OUT_SHARE:
            raise UserError(
                f"--held_out_share {self.held_out_share}: give a share above 0 and at most {MAX_HELD_OUT_SHARE}"
            )
        for kind, weight in self.kinds:
            if kind not in KINDS or not (math.isfinite(weight) and weight > 0):
                raise UserError(f"--kinds {kind}:{weight:g}: choose from {','.join(KINDS)}, weights above 0")
        if not self.kinds or len(dict(self.kinds)) < len(self.kinds):
            raise UserError("--kinds: name each kind once, for example grammar,free or grammar:7,free:3")
        for language in self.languages:
            if not self.weigh_kinds(language):
                raise UserError(
                    f"--kinds {self.kinds[0][0]}: {language} has only {','.join(list_kinds(language))} sentences"
                )
            list_speakers(language, self.num_voices, self.seed)
            for kind in self.weigh_kinds(language):
                for split in SPLITS:
                    if not list_split(language, kind, split, self.held_out_share):
                        raise UserError(
                            f"--held_out_share {self.held_out_share}: holds out no {kind} sentence of {language}"
                        )
        train_seconds = self.hours * 3600 * (1 - self.held_out_share) / len(self.languages)
        if train_seconds < self.num_voices * _SHORT_UTTERANCE_SECONDS:
            raise UserError(
                f"--hours {self.hours:g}: {train_seconds:.0f} s of training speech a language cannot hold "
                f"{self.num_voices} voices; give at least {self.minimum_hours():.4f} hours or fewer voices"
            )

    def minimum_hours(self) -> float:
        """Fewest hours in which every voice is heard in training, rounded up."""
        seconds = self.num_voices * _SHORT_UTTERANCE_SECONDS * len(self.languages) / (1 - self.held_out_share)
        return math.ceil(seconds / 0.36) / 10_000

    def weigh_kinds(self, language: str) -> dict[str, float]:
        """Share of utterances of each kind that the language has."""
        weights = {kind: weight for kind, weight in self.kinds if kind in list_kinds(language)}
        return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One planned utterance."""

    id: str
    text: str
    kind: str
    speaker: Speaker
    language: str
    split: str


def plan_utterances(config: CorpusConfig, language: str, split: str) -> Iterator[Utterance]:
    """Yield the endless, fixed sequence of utterances of one language and split.

    Kinds alternate by weight. Each kind's sentences come in a shuffled order, all of them before any repeats. Voices come
    in shuffled blocks that hold every voice once, so that the first `num_voices` utterances already use them all.
    """
    weights = config.weigh_kinds(language)
    speakers = {speaker.name: speaker for speaker in list_speakers(language, config.num_voices, config.seed)}
    choices = {kind: list_split(language, kind, split, config.held_out_share) for kind in weights}
    orders: dict[str, list[str]] = {}
    voices: list[str] = []
    counts = dict.fromkeys(weights, 0)
    for i in itertools.count():
        # The kind that lags most behind its share; ties go to the first named.
        kind = max(weights, key=lambda kind: weights[kind] * (i + 1) - counts[kind])
        epoch, index = divmod(counts[kind], len(choices[kind]))
        if index == 0:
            orders[kind] = order_sentences(choices[kind], config.seed, epoch)
        counts[kind] += 1
        block, place = divmod(i, config.num_voices)
        if place == 0:
            voices = order_sentences(list(speakers), config.seed, block)
        yield Utterance(
            id=f"{language}-{split}-{i:06d}",
            text=orders[kind][index],
            kind=kind,
            speaker=speakers[voices[place]],
            language=language,
            split=split,
        )
