"""Measure speed and memory: prepare, encode, train, loader, the language model, the flow, the vocoder, or all.

Each part runs in its own process, on speech made up on the spot unless --manifest or --corpus name real speech. Medians
over --repeats are printed as a Markdown table, and written as JSON to --out. Compilation and first batches are left out.

  prepare   x realtime per core: decode, resample to 24 kHz, FLAC, hash
  encode    x realtime: waveforms to tokens, tiny and official size (or --size), random weights
  train     steps/s, utterances/s, x realtime of the preset speech_tokenizer_tiny (or --size official)
  loader    utterances/s per worker, for 0, 1 and 2 worker processes; with --utterances N also the seconds and memory
            to the first batch of a synthetic index of N rows
  lm-train  tokens/s and share of the machine's matrix rate: loss and gradients of the language model, no optimizer
  lm-decode ms a speech token behind a prefilled prompt
  flow-train    frames/s and memory: loss and gradients of the flow, no optimizer, tiny size (or --size official)
  flow-offline  ms a call of the velocity network, x realtime of a whole solve
  flow-stream   ms a hop after 5 s and after 60 s; an utterance in hops against solving all of it anew for each hop
  vocoder   whole utterances; ms a hop after 5 s and after 60 s, the first hop, the flush; an utterance in hops against one
            piece; kB of a stream; its hold-back, and how near samples are that come before it (of a trained --run)
  synth     requests through all stages: first audio, real-time factor, hops, what a player waits, the time of each stage;
            text in hand and arriving, --concurrent N at once; tiny: a soak of 200 mixed requests. Of random parameters, or
            of a model directory (--run) and its first voice
  overhead  percent that an async save every 50 steps, and logging, add to training steps of at least 200 ms, in pairs

On a CPU lm-train and lm-decode have official width, 4 layers and fp32. They and flow-offline race PyTorch there on the same
weights, repeats in turn (pip install 'cv2jax[official]'; --against '' goes without); elsewhere bf16, ours alone. synth of
official size is held there against what the official stream's language model and velocity network take in PyTorch.

  cv2jax bench all --out bench.json
  cv2jax bench loader --utterances 100000000
  cv2jax bench synth --size official --concurrent 4
  cv2jax bench vocoder --run runs/vocoder --audio recording.wav
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = (
    "{prepare|encode|train|loader|lm-train|lm-decode|flow-train|flow-offline|flow-stream|vocoder|synth|overhead|all}"
    " [flags]"
)


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string(
        "size", "", "tiny or official; by default encode takes both, lm-… official, others tiny.", flag_values=flags
    )
    define.DEFINE_float("seconds", 0.0, "Speech in a measurement; 0 chooses.", flag_values=flags)
    define.DEFINE_integer("repeats", 3, "Measurements of each figure.", flag_values=flags)
    define.DEFINE_integer("utterances", 0, "Rows of a synthetic index that loader also plans.", flag_values=flags)
    define.DEFINE_string("manifest", "", "Manifest that prepare reads, instead of made-up speech.", flag_values=flags)
    define.DEFINE_string(
        "corpus", "", "Prepared corpus for train and loader, instead of a made-up one.", flag_values=flags
    )
    define.DEFINE_string(
        "against",
        "torch",
        "Whom lm-…, flow-offline and synth race on a CPU: torch, or '' for nobody.",
        flag_values=flags,
    )
    define.DEFINE_integer(
        "batch", 0, "Rows that vocoder speaks at once; 0: 1, on a GPU or TPU 1 and 16.", flag_values=flags
    )
    define.DEFINE_integer("concurrent", 0, "Requests that synth also speaks at once.", flag_values=flags)
    text = "Workdir of a trained vocoder, or model directory for synth, instead of random parameters."
    define.DEFINE_string("run", "", text, flag_values=flags)
    define.DEFINE_string("audio", "", "Recording that vocoder copies, instead of made-up speech.", flag_values=flags)
    define.DEFINE_string("out", None, "File for the JSON report.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the benchmarks and prints the table."""
    from cv2jax.jobs.bench import BENCHES, bench, format_table
    from cv2jax.jobs.bench_options import BenchOptions

    if len(args) != 1:
        raise UserError(f"expected one of {', '.join((*BENCHES, 'all'))}; got {len(args)} arguments")

    values = flags.flag_values_dict()
    out = values.pop("out")
    print(format_table(bench(args[0], BenchOptions(**values), out)))
    return 0
