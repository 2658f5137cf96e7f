"""Speak texts with a trained language model: its speech tokens, and how each text ended.

RUN is the --workdir of `cv2jax train` with a text_speech_lm; its newest checkpoint is used. Every TEXT is one request; "-"
reads one from each line of standard input. A text ends "ok" at its end of speech, "hit_limit" where max_length cut it, and
"non_finite" where the model failed: only "ok" is a whole utterance, and anything else makes the exit code 3. --stream lays
text and speech out as if the text arrived while it is spoken. With --speech_tokenizer, the run that made the tokens which
the model learnt, it also says what that run's recogniser hears. With --lora, a side file that `cv2jax export --to lora`
wrote, it speaks as the run that trained those low-rank factors on RUN.

  cv2jax say runs/lm "bring the red ball under the table" --speech_tokenizer runs/tokenizer
  cv2jax say runs/lm - --out said.jsonl --stream < sentences.txt
"""

import sys

from absl import flags as absl_flags

from cv2jax.config import UserError

EXIT_NOT_WHOLE = 3
USAGE = "RUN TEXT... [--out TOKENS.jsonl] [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("out", None, "File for the tokens, .jsonl.", flag_values=flags)
    define.DEFINE_boolean("stream", False, "Lay text and speech out interleaved.", flag_values=flags)
    define.DEFINE_string("instruct", "", "Instruction in front of every text.", flag_values=flags)
    define.DEFINE_string("speaker", "", "Speaker in front of every text (multi-speaker models).", flag_values=flags)
    define.DEFINE_string(
        "normalizer", None, "none, wetext or auto; by default as the corpus was read.", flag_values=flags
    )
    define.DEFINE_integer("seed", 0, "Same seed, same tokens.", flag_values=flags)
    define.DEFINE_float("temperature", 1.0, "0 takes the likeliest token always.", flag_values=flags)
    define.DEFINE_float("top_p", 0.8, "Nucleus; 1 sets no bound.", flag_values=flags)
    define.DEFINE_integer("top_k", 25, "Candidates; 0 sets no bound.", flag_values=flags)
    define.DEFINE_integer("min_length", None, "Speech tokens at least (25 a second).", flag_values=flags)
    define.DEFINE_integer("max_length", None, "Speech tokens at most.", flag_values=flags)
    define.DEFINE_string("text_tokenizer", "", "Directory; by default that of the run.", flag_values=flags)
    define.DEFINE_string("speech_tokenizer", "", "Run whose recogniser reads the tokens.", flag_values=flags)
    define.DEFINE_integer("step", None, "Checkpoint; by default the newest.", flag_values=flags)
    define.DEFINE_string(
        "lora", "", "Low-rank factors trained on RUN: the file of `export --to lora`.", flag_values=flags
    )


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Speaks, prints how each text ended, and writes the tokens."""
    if len(args) < 2:
        raise UserError(f"expected RUN and at least one TEXT, got {len(args)} arguments; see `cv2jax say --help`")
    values = flags.flag_values_dict()
    out, run, texts = values.pop("out"), args[0], args[1:]
    if texts == ["-"]:
        texts = [line.strip() for line in sys.stdin if line.strip()]
        if not texts:
            raise UserError("-: standard input holds no text; give one a line")
    from cv2jax.jobs.say import SayOptions, check_out, say, write_spoken
    from cv2jax.synthesis.sampling import SamplingOptions

    if out is not None:
        check_out(out)
    sampling = SamplingOptions(**{name: values.pop(name) for name in ("temperature", "top_p", "top_k")})
    spoken = say(run, texts, SayOptions(sampling=sampling, **values))
    if out is not None:
        write_spoken(out, run, spoken)
    for one in spoken:
        tokens = len(one.result.speech_tokens)
        heard = "" if one.heard is None else f"; heard: {one.heard}"
        print(f"{one.result.status}: {tokens} tokens, {tokens / 25:.2f} s: {one.text}{heard}")
    return EXIT_NOT_WHOLE if any(one.result.status != "ok" for one in spoken) else 0
