"""Decode, check and resample the audio of a manifest into a corpus of shards.

MANIFEST is a JSONL file, one utterance a line: id, audio, text (may be null), speaker, language, split, and optionally
instruct. Audio paths are absolute, relative to the manifest, or `archive.tar::member`. OUT becomes a corpus that
`cv2jax train` reads: OUT/shards, OUT/index.json, and OUT/report.md with what was refused and why.

Killed at any moment, the same command resumes; run again, it does nothing, or redoes just the shards whose lines or
audio files changed (lines appended to a manifest cost little, a line in its middle moves all behind it). The result
does not depend on the number of workers. Bad utterances are refused, counted and listed; with --strict the first one
stops the run (exit code 2).

Where one machine is not enough, machines that see the same paths share the shards, and the bytes stay the same: --part i/n
makes each n-th of them, and the command without --part then writes index and report. Or --engine beam has Apache Beam
(extra [beam]) make them; what stands behind -- are Beam's options. Without a runner there it uses processes of this machine.

  cv2jax prepare corpus/manifest.jsonl prepared
  cv2jax prepare manifest.jsonl prepared --workers 16 --encoding pcm16 --strict
  cv2jax prepare manifest.jsonl prepared --part 2/8
  cv2jax prepare manifest.jsonl prepared --engine beam -- --runner=FlinkRunner --flink_master=HOST:8081
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "MANIFEST OUT [flags] [-- BEAM_OPTION...]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_integer("rate_hz", 24000, "Sample rate of the corpus.", flag_values=flags)
    define.DEFINE_string("encoding", "flac", "flac (lossless, half the size) or pcm16.", flag_values=flags)
    define.DEFINE_integer("workers", 0, "Processes; 0 takes one a core.", flag_values=flags)
    define.DEFINE_integer("shard_utterances", 0, "Utterances of a shard; 0 chooses 8 to 2048.", flag_values=flags)
    define.DEFINE_string("vocabulary", None, "Characters text must keep to: JSON list or run.json.", flag_values=flags)
    define.DEFINE_boolean("strict", False, "Stop at the first bad utterance.", flag_values=flags)
    define.DEFINE_boolean("verify", False, "Hash the finished shards, redo the damaged ones.", flag_values=flags)
    define.DEFINE_string("part", None, "Only this part of the shards, i/n; or auto, of a launcher.", flag_values=flags)
    define.DEFINE_string("engine", "local", "local or beam: who makes the shards.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it did."""
    if len(args) < 2 or (len(args) > 2 and not args[2].startswith("--")):
        raise UserError(f"expected MANIFEST and OUT, got {len(args)} arguments; see `cv2jax prepare --help`")
    from cv2jax.jobs.prepare import prepare

    manifest, out, *beam_options = args
    result = prepare(manifest, out, beam_options=beam_options, **flags.flag_values_dict())
    kept = f"{result.num_utterances} utterances, {result.total_seconds / 3600:.2f} h"
    if not result.changed and flags["part"].value is None:
        print(f"{out} is up to date: nothing to do ({kept}, {result.num_refused} refused)")
        return 0
    speed = result.speech_seconds / result.wall_seconds
    if flags["part"].value is not None:
        kept = f"part {flags['part'].value}: {kept}; after all parts give the command without --part"
    print(f"{out}: {kept}; {result.num_refused} refused, {result.num_warnings} warnings (see {out}/report.md)")
    print(
        f"{result.num_shards_made} shards made, {result.num_shards_kept} kept, in {result.wall_seconds:.1f} s: "
        f"{speed:.0f}x realtime on {result.workers} workers, {speed / result.workers:.0f}x a core; "
        f"peak memory of a worker {result.peak_worker_bytes / 2**20:.0f} MiB"
    )
    return 0
