"""Speak a small corpus of synthetic speech with espeak-ng (no data to download).

Writes OUT/audio/*.flac (22,050 Hz mono), OUT/manifest.jsonl (ready for `cv2jax prepare`), OUT/grammar.jsgf (the English slot
grammar, for an independent recogniser) and OUT/summary.json. The same arguments give the same bytes, whatever the number of
workers; a run that was killed goes on when it is started again. Held-out sentences (split "test") never occur in training.
Needs espeak-ng: pip install 'cv2jax[corpus]' (GPL; only this verb uses it).

    cv2jax corpus /tmp/corpus --hours 0.5
    cv2jax corpus /tmp/corpus4 --hours 2 --languages en,cmn,ja,ko --voices 12 --seed 1
    cv2jax corpus /tmp/mostly_grammar --hours 0.5 --kinds grammar:7,free:3
"""

from __future__ import annotations

import absl.flags

from cv2jax.config import UserError

USAGE = "OUT --hours H [flags]"


def define_flags(flags: absl.flags.FlagValues) -> None:
    """Define the verb's flags."""
    define = absl.flags
    define.DEFINE_float("hours", None, "Hours of speech in all, shared equally by the languages.", flag_values=flags)
    define.DEFINE_list("languages", ["en"], "Languages: en, cmn, ja, ko.", flag_values=flags)
    define.DEFINE_integer("voices", 8, "Voices of each language.", flag_values=flags)
    define.DEFINE_integer("seed", 0, "Another seed gives other sentences, voices' pitch and order.", flag_values=flags)
    define.DEFINE_float(
        "held_out_share", 0.05, "Share of sentences, and of hours, held out as test.", flag_values=flags
    )
    define.DEFINE_list("kinds", ["grammar", "free"], "Kinds of sentence, KIND or KIND:WEIGHT.", flag_values=flags)
    define.DEFINE_integer("workers", 0, "Processes that speak; 0 is one for each processor.", flag_values=flags)


def parse_kinds(items: list[str]) -> tuple[tuple[str, float], ...]:
    """Parse ["grammar:7", "free:3"] to pairs of kind and weight (1 if not given); raises UserError."""
    kinds = []
    for item in items:
        kind, _, weight = item.partition(":")
        try:
            kinds.append((kind.strip(), float(weight or 1)))
        except ValueError as error:
            raise UserError(f"--kinds {item}: write KIND or KIND:WEIGHT, for example grammar:7,free:3") from error
    return tuple(kinds)


def main(args: list[str], flags: absl.flags.FlagValues) -> int | None:
    """Run the verb."""
    if len(args) != 1:
        raise UserError(f"expected one argument, the folder OUT, and got {len(args)}: cv2jax corpus {USAGE}")
    if flags.hours is None:
        raise UserError("--hours is missing: for example --hours 0.5")
    from cv2jax.jobs.corpus import CorpusConfig, make_corpus

    config = CorpusConfig(
        hours=flags.hours,
        languages=tuple(language.strip() for language in flags.languages),
        num_voices=flags.voices,
        seed=flags.seed,
        held_out_share=flags.held_out_share,
        kinds=parse_kinds(flags.kinds),
    )
    summary = make_corpus(args[0], config, num_workers=flags.workers)
    print(f"{args[0]}: {'already there, checked: ' if summary.was_complete else ''}{summary.format()}")
    return 0
