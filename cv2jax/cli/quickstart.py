"""The main job on an embedded corpus: speak it, prepare it, train the speech tokenizer, draw the report.

    cv2jax quickstart                       # about 5 minutes on two CPU cores, into runs/quickstart
    cv2jax quickstart --out /tmp/q --hours 0.2 --set num_steps=300

Needs the extra [corpus] (espeak-ng). Calling it again goes on where it stopped.
"""

from absl import flags

from cv2jax.config import UserError

USAGE = "[--out DIR] [--hours H] [--voices N] [--seed S] [--set key=value]..."


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    flags.DEFINE_string("out", "runs/quickstart", "directory of everything it makes", flag_values=values)
    flags.DEFINE_float("hours", 1.0, "hours of speech to synthesize", flag_values=values)
    flags.DEFINE_list("languages", ["en"], "languages of the corpus", flag_values=values)
    flags.DEFINE_integer("voices", 8, "voices a language", flag_values=values)
    flags.DEFINE_integer("seed", 0, "seed of the corpus", flag_values=values)
    flags.DEFINE_integer("workers", 0, "processes that speak and prepare; 0 takes every core", flag_values=values)
    flags.DEFINE_multi_string("set", [], "config override key=value; may be repeated", flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Runs it; returns the exit code."""
    if args:
        raise UserError(f"unexpected argument '{args[0]}'; usage: cv2jax quickstart {USAGE}")
    from cv2jax.jobs.corpus_plan import CorpusConfig
    from cv2jax.jobs.quickstart import quickstart

    corpus = CorpusConfig(
        hours=values.hours,
        languages=tuple(language.strip() for language in values.languages),
        num_voices=values.voices,
        seed=values.seed,
    )
    assignments = tuple(values.set)
    return quickstart(values.out, corpus, assignments, workers=values.workers).exit_code
