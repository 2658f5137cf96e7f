"""Turn audio files or a manifest into the speech tokens of a trained run.

RUN is the --workdir of `cv2jax train` with a speech tokenizer; its newest checkpoint is used. An INPUT is an audio file
or a manifest (.jsonl). Tokens (25 a second) go to --out: .jsonl, one utterance a line, or .npz, one array an id. The
file carries the tokenizer's hash, and appears only when everything is done.

n samples at 16 kHz give n // 160 frames and exactly ceil(frames / 4) tokens. Up to 30 s a file is one piece; a longer one
is cut into 30-s windows every 26 s, each token taken from the window in which it lies farther from the cut. Attention is
global, so windows approximate the one piece: --compare_one_piece says by how much. A bad input is named, counted and
left out; with --strict it stops the job (exit code 2).

Many machines share a manifest: --part i/n makes one of n parts beside --out (given again after a kill, it goes on), and then
the same command with --merge for --part puts them together to the bytes that one machine would have written. Under srun,
mpirun, or CV2JAX_DISTRIBUTED=1 on a TPU pod, --part auto takes this process's number.

  cv2jax encode runs/tokenizer hello.wav long_talk.mp3 --out tokens.jsonl
  cv2jax encode runs/tokenizer manifest.jsonl --split test --out test.npz
  cv2jax encode runs/tokenizer manifest.jsonl --out tokens.jsonl --part 2/8
  cv2jax encode runs/tokenizer manifest.jsonl --out tokens.jsonl --merge
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "RUN INPUT... --out TOKENS.jsonl|TOKENS.npz [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("out", None, "File for the tokens, .jsonl or .npz.", flag_values=flags)
    define.DEFINE_float("batch_seconds", 120.0, "Audio in a batch, padding included.", flag_values=flags)
    define.DEFINE_string("split", None, "Only this split of the manifests.", flag_values=flags)
    define.DEFINE_string("compute_dtype", "float32", "float32 or bfloat16 (faster).", flag_values=flags)
    define.DEFINE_integer("workers", 0, "Threads that decode; 0 takes one a core.", flag_values=flags)
    define.DEFINE_boolean("strict", False, "Stop at the first bad input.", flag_values=flags)
    text = "Count the tokens that windows change in the first 60 s of each file beyond 30 s."
    define.DEFINE_boolean("compare_one_piece", False, text, flag_values=flags)
    define.DEFINE_string("part", None, "Only this part, i/n; or auto, of a launcher.", flag_values=flags)
    define.DEFINE_boolean("merge", False, "Make --out of its parts.", flag_values=flags)
    text = "Rows of a block, which a kill costs at most; the same for all parts. 0: 1024 for 120 s of batch_seconds."
    define.DEFINE_integer("block_rows", 0, text, flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it did."""
    if len(args) < 2:
        raise UserError(f"expected RUN and at least one INPUT, got {len(args)} arguments; see `cv2jax encode --help`")
    values = flags.flag_values_dict()
    out = values.pop("out")
    if out is None:
        raise UserError("--out is missing: give the file for the tokens, .jsonl or .npz")
    from cv2jax.jobs.encode import encode_audio

    result = encode_audio(args[0], args[1:], out, **values)
    print(
        f"{result.path}: {result.num_utterances} utterances, {result.seconds:.1f} s, {result.num_tokens} tokens; "
        f"{result.num_refused} refused; {result.encoded_seconds / result.wall_seconds:.1f}x realtime, "
        f"{result.num_programs} programs compiled; tokenizer {result.tokenizer[:16]}"
    )
    if result.num_blocks:
        print(
            f"{result.num_kept} of {result.num_blocks} blocks were there; after all parts give --merge instead of --part"
        )
    if result.comparison is not None:
        different, total = result.comparison.num_different, result.comparison.num_tokens
        share = f" ({100 * different / total:.2f} %)" if total else ""
        print(
            f"windows against one piece, first 60 s of {result.num_compared} files beyond 30 s: "
            f"{different} of {total} tokens differ{share}"
        )
    return 0
