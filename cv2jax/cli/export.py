"""Write trained models in a form that others read: a Qwen2 directory, low-rank factors, the official model directory.

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

  cv2jax export runs/lm --to qwen2 --out backbone --carry_from CosyVoice-BlankEN
  cv2jax export runs/voice --to lora --out voice.safetensors
  cv2jax export runs/lm --to qwen2 --out backbone --lora voice.safetensors
  cv2jax export model/ --to official --out CosyVoice2-mine --text_speech_lm runs/lm
"""

from typing import Any

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "RUN|MODEL --to qwen2|lora|official --out PLACE [flags]"
STAGES = ("text_speech_lm", "flow_matching", "hift_vocoder", "speech_tokenizer", "speaker_encoder")
_OFFICIAL_ONLY = (*STAGES, "hift_names")


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("to", None, "Form to write: qwen2, lora or official.", flag_values=flags)
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
    define.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=flags)
    define.DEFINE_boolean("ema", True, "The moving average, where the run keeps one.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it wrote."""
    values = flags.flag_values_dict()
    is_official = values["to"] == "official"
    if len(args) != 1 and not (is_official and not args):
        raise UserError(f"expected one RUN, got {len(args)}; usage: cv2jax export {USAGE}")
    for name in ("to", "out"):
        if values[name] is None:
            raise UserError(f"--{name} is missing; usage: cv2jax export {USAGE}")
    if is_official:
        return _export_official(args[0] if args else None, values, flags)
    for name in _OFFICIAL_ONLY:
        if values.pop(name) != flags[name].default:
            raise UserError(f"--{name} is for --to official; leave it out")
    target, out, step, ema = (values.pop(name) for name in ("to", "out", "step", "ema"))
    from cv2jax.jobs.export import ExportOptions, export

    result = export(args[0], target, out, options=ExportOptions(**values), step=step, ema=ema)
    averaged = ", moving average" if result.averaged else ""
    print(f"{out}: {target}, step {result.step}{averaged}, {result.num_parameters / 1e6:.3f} M parameters")
    return 0


def _export_official(model: str | None, values: dict[str, Any], flags: absl_flags.FlagValues) -> int:
    for name in ("dtype", "carry_from", "text_tokenizer", "step", "ema"):
        if values[name] != flags[name].default:
            raise UserError(f"--{name} is not for --to official; leave it out")
    from cv2jax.jobs.export_official import OfficialOptions, export_official

    runs = {stage: values[stage] for stage in STAGES if values[stage]}
    options = OfficialOptions(runs=runs, lora=values["lora"], hift_names=values["hift_names"])
    result = export_official(model, values["out"], options)
    voices = f", {len(result.voices)} voices" if result.voices else ""
    print(
        f"{values['out']}: official, {len(result.files)} files{voices}, {result.num_parameters / 1e6:.3f} M parameters"
    )
    return 0
