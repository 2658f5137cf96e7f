"""Write the manifest of a corpus in its publisher's layout: LibriTTS, LJSpeech, AISHELL-3, Emilia, Kaldi.

FORMAT is one of libritts, ljspeech, aishell3, emilia (webdataset archives), kaldi (wav.scp, utt2spk, text, utt2lang).
DIR is the unpacked corpus; Emilia's archives stay packed. Corpora without a held-out part (LJSpeech, Emilia) get one:
the share --held_out, chosen by a hash of the ids. Then run `cv2jax prepare OUT.jsonl CORPUS`.

  cv2jax manifest libritts LibriTTS libritts.jsonl
  cv2jax manifest kaldi data kaldi.jsonl --language en
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "FORMAT DIR OUT.jsonl [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string(
        "language", None, "Language of every utterance, for corpora that do not say.", flag_values=flags
    )
    define.DEFINE_float("held_out", 0.01, "Share that becomes the split test (ljspeech, emilia).", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it found."""
    if len(args) != 3:
        raise UserError(f"expected FORMAT, DIR and OUT, got {len(args)} arguments; see `cv2jax manifest --help`")
    from cv2jax.jobs.manifest import make_manifest

    corpus_format, directory, out = args
    summary = make_manifest(corpus_format, directory, out, **flags.flag_values_dict())
    counts = ", ".join(f"{split} {count}" for split, count in summary.splits.items())
    print(f"{out}: {counts} utterances; {summary.num_without_text} without text")
    return 0
