"""Turn the audio of a manifest into speaker embeddings of a trained run, one a file and one a speaker.

RUN is the --workdir of `cv2jax train` with a speaker encoder; its newest checkpoint is used. --out is one .npz with `ids`,
`embeddings`, `speakers`, `speaker_embeddings` (the mean of the speaker's), `num_utterances`, and `metadata` with the
encoder's hash. Vectors are raw: L2-normalise them to compare. The file appears only when everything is done.

An utterance that is silent, shorter than 55 ms or cannot be read is named, counted and left out; with --strict it stops the
job (exit code 2). Clipped audio is named and kept.

  cv2jax embed runs/speaker manifest.jsonl --out embeddings.npz
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "RUN MANIFEST --out EMBEDDINGS.npz [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("out", None, "File for the embeddings, .npz.", flag_values=flags)
    define.DEFINE_float("batch_seconds", 120.0, "Audio in a batch, padding included.", flag_values=flags)
    define.DEFINE_string("split", None, "Only this split of the manifest.", flag_values=flags)
    define.DEFINE_integer("workers", 0, "Threads that decode; 0 takes one a core.", flag_values=flags)
    define.DEFINE_boolean("strict", False, "Stop at the first bad utterance.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it did."""
    if len(args) != 2:
        raise UserError(f"expected RUN and one MANIFEST, got {len(args)} arguments; see `cv2jax embed --help`")
    values = flags.flag_values_dict()
    out = values.pop("out")
    if out is None:
        raise UserError("--out is missing: give the file for the embeddings, .npz")
    from cv2jax.jobs.embed import embed_manifest

    result = embed_manifest(args[0], args[1], out, **values)
    print(
        f"{out}: {result.num_utterances} utterances of {result.num_speakers} speakers ({result.num_single} with one), "
        f"{result.seconds:.1f} s; {result.num_refused} refused, {result.num_warned} warned of; "
        f"{result.seconds / result.wall_seconds:.1f}x realtime, {result.num_programs} programs compiled; "
        f"encoder {result.encoder[:16]}"
    )
    return 0
