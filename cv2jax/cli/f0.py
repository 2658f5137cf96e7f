"""Find the fundamental frequency of every utterance of a prepared corpus, for the vocoder.

CORPUS is a directory of `cv2jax prepare` at 24 kHz. CORPUS/f0 gets 50 values a second of audio, in Hz, 0 where unvoiced:
one for each mel frame, at the frame's centre. Needs pyworld (extra [vocoder]). --method harvest is upstream's and the
better tracker; dio is some 25 times as fast. Both are refined by StoneMask.

Killed at any moment, the same command resumes; run again, it does nothing, or just the shards whose audio changed. The
result does not depend on the number of workers. Utterances without any voiced frame are kept, as zeros, and counted.

  cv2jax f0 prepared
  cv2jax f0 prepared --method dio --workers 16
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "CORPUS [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("method", "harvest", "harvest or dio (faster).", flag_values=flags)
    define.DEFINE_integer("workers", 0, "Processes; 0 takes one a core.", flag_values=flags)
    define.DEFINE_boolean("verify", False, "Hash the finished shards, redo the damaged ones.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it did."""
    if len(args) != 1:
        raise UserError(f"expected CORPUS, got {len(args)} arguments; see `cv2jax f0 --help`")
    from cv2jax.jobs.f0 import compute_f0

    result = compute_f0(args[0], **flags.flag_values_dict())
    voiced = 100 * result.num_voiced / max(result.num_frames, 1)
    kept = (
        f"{result.num_utterances} utterances, {result.num_frames} frames, {voiced:.1f} % voiced; "
        f"{result.num_unvoiced_utterances} utterances without a voiced frame"
    )
    if not result.changed:
        print(f"{args[0]}/f0 is up to date: nothing to do ({kept})")
        return 0
    print(f"{args[0]}/f0: {kept}")
    speed = result.speech_seconds / result.wall_seconds
    alone = result.speech_seconds / max(result.cpu_seconds, 1e-9)
    print(
        f"{result.num_shards_made} shards made, {result.num_shards_kept} kept, in {result.wall_seconds:.1f} s: "
        f"{speed:.1f}x realtime on {result.workers} workers, {alone:.1f}x a core's time"
    )
    return 0
