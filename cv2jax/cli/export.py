"""Write trained models in a form that others read: a Qwen2 directory, low-rank factors, the official directory, a bundle.

RUN is the --workdir of `cv2jax train` with a language model; its newest checkpoint is used, or that of --step, and of it
the moving average of the parameters where the run keeps one (--noema: the parameters themselves).

--to qwen2 writes --out as a Hugging Face directory: backbone and text embedding, low-rank factors merged, and the text
tokenizer of the run. With --carry_from, the directory that the backbone came from, the rest of its config.json and an
untied text head are carried through. --to lora writes what a run with lora.rank > 0 trained, in float32, as one
.safetensors file that names its base: the run that it started from (init_from), which takes it with --lora, here with
--to qwen2 and in `cv2jax say`.

--to official takes a model directory, which holds a run or a link to one for each stage (text_speech_lm, flow_matching,
hift_vocoder, speech_tokenizer, speaker_encoder) and voices/*.safetensors, and writes what the official PyTorch, vLLM and
TensorRT-LLM servers load. --text_speech_lm RUN and its like take the place of a stage of the directory, all five that of
the directory itself. Needs the extra: pip install 'cv2jax[official]'.

--to bundle takes a model directory (see `cv2jax synthesize --help`) and writes what streams speech with jax alone: parameters,
programs for CPU, CUDA and TPU, text tokenizer, voices (those of the directory, and each --voice), golden answers. Programs are
of few sizes: up to --slots requests (4), --seconds a piece with the voice's recording (60). The programs are tried on this
machine against the model in float32, and nothing is written where they drift. Programs age with jax: --from_bundle OLD writes
them again, from a bundle alone. `cv2jax selftest` tries a bundle on another machine.

  cv2jax export runs/lm --to qwen2 --out backbone --carry_from CosyVoice-BlankEN
  cv2jax export runs/voice --to lora --out voice.safetensors
  cv2jax export runs/lm --to qwen2 --out backbone --lora voice.safetensors
  cv2jax export model/ --to official --out CosyVoice2-mine --text_speech_lm runs/lm
  cv2jax export model/ --to bundle --out bundles/mine --dtype bfloat16
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "RUN|MODEL --to qwen2|lora|official|bundle --out PLACE [flags]"
STAGES = ("text_speech_lm", "flow_matching", "hift_vocoder", "speech_tokenizer", "speaker_encoder")
_OFFICIAL_ONLY = (*STAGES, "hift_names")
_BUNDLE_ONLY = ("platforms", "slots", "seconds", "voice", "from_bundle")


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("to", None, "Form to write: qwen2, lora, official or bundle.", flag_values=flags)
    define.DEFINE_string("out", None, "New directory, or file for lora.", flag_values=flags)
    define.DEFINE_string("dtype", "float32", "Of the tensors: float32 or bfloat16.", flag_values=flags)
    define.DEFINE_string("carry_from", "", "Hugging Face directory that the backbone came from.", flag_values=flags)
    text = "Directory of the text tokenizer; by default that of the run."
    define.DEFINE_string("text_tokenizer", "", text, flag_values=flags)
    define.DEFINE_string(
        "lora", "", "Low-rank factors trained on RUN: the file of `export --to lora`.", flag_values=flags
    )
    for stage in STAGES:
        define.DEFINE_string(stage, "", "For official: its run, in place of the model directory's.", flag_values=flags)
    names = (
        "For official, of normalised kernels: parametrised or weight_g; by default as the imported hift.pt has them."
    )
    define.DEFINE_string("hift_names", "", names, flag_values=flags)
    define.DEFINE_list("platforms", "cpu,cuda,tpu", "For bundle: of its programs.", flag_values=flags)
    define.DEFINE_integer("slots", None, "For bundle: requests at once; by default 4.", flag_values=flags)
    text = "For bundle: of a piece, recording included; by default 60."
    define.DEFINE_float("seconds", None, text, flag_values=flags)
    define.DEFINE_multi_string("voice", [], "For bundle: a voice's file; may be repeated.", flag_values=flags)
    define.DEFINE_string("from_bundle", "", "For bundle: one to write again, in place of MODEL.", flag_values=flags)
    define.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=flags)
    define.DEFINE_boolean("ema", True, "The moving average, where the run keeps one.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it wrote."""
    values = flags.flag_values_dict()
    to = values["to"]
    num_args = (0, 1) if to == "official" else (0,) if to == "bundle" and values["from_bundle"] else (1,)
    if len(args) not in num_args:
        raise UserError(f"expected one RUN, got {len(args)}; usage: cv2jax export {USAGE}")
    for name in ("to", "out"):
        if values[name] is None:
            raise UserError(f"--{name} is missing; usage: cv2jax export {USAGE}")
    for form, names in (("official", _OFFICIAL_ONLY), ("bundle", _BUNDLE_ONLY)):
        if to != form:
            _refuse(values, flags, names, f"is for --to {form}")
    model = args[0] if args else None
    if to == "official":
        return _export_official(model, values, flags)
    if to == "bundle":
        return _export_bundle(model, values, flags)
    from cv2jax.jobs.export import ExportOptions, export

    options = ExportOptions(**{field.name: values[field.name] for field in dataclasses.fields(ExportOptions)})
    result = export(args[0], to, values["out"], options=options, step=values["step"], ema=values["ema"])
    averaged = ", moving average" if result.averaged else ""
    print(f"{values['out']}: {to}, step {result.step}{averaged}, {result.num_parameters / 1e6:.3f} M parameters")
    return 0


def _refuse(values: dict[str, Any], flags: absl_flags.FlagValues, names: Sequence[str], why: str) -> None:
    for name in names:
        if values[name] != flags[name].default:
            raise UserError(f"--{name} {why}; leave it out")


def _export_official(model: str | None, values: dict[str, Any], flags: absl_flags.FlagValues) -> int:
    _refuse(values, flags, ("dtype", "carry_from", "text_tokenizer", "step", "ema"), "is not for --to official")
    from cv2jax.jobs.export_official import OfficialOptions, export_official

    runs = {stage: values[stage] for stage in STAGES if values[stage]}
    options = OfficialOptions(runs=runs, lora=values["lora"], hift_names=values["hift_names"])
    result = export_official(model, values["out"], options)
    voices = f", {len(result.voices)} voices" if result.voices else ""
    print(
        f"{values['out']}: official, {len(result.files)} files{voices}, {result.num_parameters / 1e6:.3f} M parameters"
    )
    return 0


def _export_bundle(model: str | None, values: dict[str, Any], flags: absl_flags.FlagValues) -> int:
    _refuse(values, flags, ("carry_from", "text_tokenizer", "lora", "step", "ema"), "is not for --to bundle")
    from cv2jax.jobs.export_bundle import BundleOptions, export_bundle
    from cv2jax.synthesis.gate import format_checks

    options = BundleOptions(
        dtype=values["dtype"] if flags["dtype"].present else None,
        platforms=tuple(values["platforms"]),
        slots=values["slots"],
        seconds=values["seconds"],
        voices=tuple(values["voice"]),
        from_bundle=values["from_bundle"],
    )
    report = export_bundle(model, values["out"], options)
    print(format_checks(report.checks))
    print(
        f"{values['out']}: bundle, {report.num_programs} programs, {report.num_bytes / 1e6:.1f} MB; written in"
        f" {report.export_seconds:.0f} s, tried in {report.gate_seconds:.0f} s"
    )
    return 0
