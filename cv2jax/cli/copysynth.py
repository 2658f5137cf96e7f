"""Copy synthesis: recordings through mel and a trained vocoder and back, measured, drawn and to listen to.

RUN is the --workdir of `cv2jax train` with a vocoder; its newest checkpoint is used. An INPUT is an audio file, a directory
of them, or a manifest (.jsonl). OUT gets metrics.json, table.md, pairs.png (spectrograms of the first four) and audio/ with
both waveforms of each recording.

Measures: multi-resolution STFT distance, log-spectral distance, mel L1, F0 RMSE over frames voiced in both (the same tracker
judges both sides), voicing error, and PESQ and STOI where they are installed (extra [judges]). --grammar, the grammar.jsgf of
`cv2jax corpus`, asks pocketsphinx what it hears in slot sentences, in the original and in the copy.

Recordings that cannot be read are named, counted and left out. A waveform with NaN makes the exit code 3.

  cv2jax copysynth runs/vocoder talk.wav --out copied
  cv2jax copysynth runs/vocoder corpus/manifest.jsonl --split test --speakers en-f3 --grammar corpus/grammar.jsgf --out copied
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

EXIT_NOT_FINITE = 3
USAGE = "RUN INPUT... --out OUT [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("out", None, "Directory for the result.", flag_values=flags)
    define.DEFINE_string("split", "", "Only this split of the manifests.", flag_values=flags)
    define.DEFINE_list("speakers", [], "Only these speakers of the manifests.", flag_values=flags)
    define.DEFINE_integer("limit", 0, "So many recordings, spread evenly; 0: all.", flag_values=flags)
    define.DEFINE_string("grammar", "", "JSGF file: also say what pocketsphinx hears.", flag_values=flags)
    define.DEFINE_string("method", "harvest", "F0 tracker: harvest or dio (faster).", flag_values=flags)
    define.DEFINE_boolean("perceptual", True, "PESQ and STOI, where installed.", flag_values=flags)
    define.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=flags)
    define.DEFINE_integer("seed", 0, "Of the vocoder's noise.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it found."""
    if len(args) < 2:
        raise UserError(
            f"expected RUN and at least one INPUT, got {len(args)} arguments; see `cv2jax copysynth --help`"
        )
    values = flags.flag_values_dict()
    out, step, seed = (values.pop(name) for name in ("out", "step", "seed"))
    if out is None:
        raise UserError("--out is missing: give a directory for the result")
    from cv2jax.jobs.copysynth import CopyOptions, copy_synthesis, load_synthesiser

    options = CopyOptions(**values | {"speakers": tuple(values["speakers"])})
    synthesise, described = load_synthesiser(args[0], step=step, seed=seed)
    result = copy_synthesis(synthesise, args[1:], out, options, describe=described)
    metrics = result.metrics
    shown = ("stft_distance", "log_spectral_distance", "f0_rmse_hz", "voicing_error", "pesq", "stoi")
    figures = ", ".join(f"{name} {metrics[name]:.3g}" for name in shown if name in metrics)
    print(
        f"{out}: {metrics['num_utterances']} recordings, {result.seconds:.1f} s; {result.num_refused} refused, "
        f"{metrics['num_without_f0']} without F0, {metrics['num_non_finite']} not finite; {figures}; "
        f"{result.seconds / max(result.synthesis_seconds, 1e-9):.1f}x realtime"
    )
    for kind, found in result.heard.items():
        print(f"heard in the {kind}: {100 * found['word_error_rate']:.1f} % of {found['num_words']} words wrong")
    if result.left_out:
        print(f"not installed and left out: {', '.join(result.left_out)} (extra [judges])")
    return EXIT_NOT_FINITE if metrics["num_non_finite"] else 0
