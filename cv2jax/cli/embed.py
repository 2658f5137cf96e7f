"""Turn the audio of a manifest into speaker embeddings of a trained run, one a file and one a speaker.

RUN is the --workdir of `cv2jax train` with a speaker encoder; its newest checkpoint is used. --out is one .npz with `ids`,
`embeddings`, `speakers`, `speaker_embeddings` (the mean of the speaker's), `num_utterances`, and `metadata` with the
encoder's hash. Vectors are raw: L2-normalise them to compare. The file appears only when everything is done.

An utterance that is silent, shorter than 55 ms or cannot be read is named, counted and left out; with --strict it stops the
job (exit code 2). Clipped audio is named and kept.

Many machines share a manifest: --part i/n makes one of n parts beside --out (given again after a kill, it goes on), and then
the same command with --merge for --part puts them together to the bytes that one machine would have written. Under srun,
mpirun, or CV2JAX_DISTRIBUTED=1 on a TPU pod, --part auto takes this process's number.

  cv2jax embed runs/speaker manifest.jsonl --out embeddings.npz
  cv2jax embed runs/speaker manifest.jsonl --out embeddings.npz --part 2/8
  cv2jax embed runs/speaker manifest.jsonl --out embeddings.npz --merge
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
    define.DEFINE_string("part", None, "Only this part, i/n; or auto, of a launcher.", flag_values=flags)
    define.DEFINE_boolean("merge", False, "Make --out of its parts.", flag_values=flags)
    text = "Rows of a block, which a kill costs at most; the same for all parts. 0: 1024 for 120 s of batch_seconds."
    define.DEFINE_integer("block_rows", 0, text, flag_values=flags)


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
    speakers = f" of {result.num_speakers} speakers ({result.num_single} with one)" if result.num_speakers else ""
    print(
        f"{result.path}: {result.num_utterances} utterances{speakers}, {result.seconds:.1f} s; "
        f"{result.num_refused} refused, {result.num_warned} warned of; "
        f"{result.embedded_seconds / result.wall_seconds:.1f}x realtime, {result.num_programs} programs compiled; "
        f"encoder {result.encoder[:16]}"
    )
    if result.num_blocks:
        print(
            f"{result.num_kept} of {result.num_blocks} blocks were there; after all parts give --merge instead of --part"
        )
    return 0
