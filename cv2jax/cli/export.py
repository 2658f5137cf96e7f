"""Write a trained language model in a form that others read: a Qwen2 directory, or a side file of low-rank factors.

RUN is the --workdir of `cv2jax train` with a language model; its newest checkpoint is used, or that of --step, and of it
the moving average of the parameters where the run keeps one (--noema: the parameters themselves).

--to qwen2 writes --out as a Hugging Face directory: backbone and text embedding, low-rank factors merged, and the text
tokenizer of the run. With --carry_from, the directory that the backbone came from, the rest of its config.json and an
untied text head are carried through. --to lora writes what a run with lora.rank > 0 trained, in float32, as one
.safetensors file that names its base: the run that it started from (init_from), which takes it with --lora, here with
--to qwen2 and in `cv2jax say`.

  cv2jax export runs/lm --to qwen2 --out backbone --carry_from CosyVoice-BlankEN
  cv2jax export runs/voice --to lora --out voice.safetensors
  cv2jax export runs/lm --to qwen2 --out backbone --lora voice.safetensors
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "RUN --to qwen2|lora --out PLACE [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("to", None, "Form to write: qwen2 or lora.", flag_values=flags)
    define.DEFINE_string("out", None, "New directory, or file for lora.", flag_values=flags)
    define.DEFINE_string("dtype", "float32", "Of the tensors: float32 or bfloat16.", flag_values=flags)
    define.DEFINE_string("carry_from", "", "Hugging Face directory that the backbone came from.", flag_values=flags)
    text = "Directory of the text tokenizer; by default that of the run."
    define.DEFINE_string("text_tokenizer", "", text, flag_values=flags)
    define.DEFINE_string(
        "lora", "", "Low-rank factors trained on RUN: the file of `export --to lora`.", flag_values=flags
    )
    define.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=flags)
    define.DEFINE_boolean("ema", True, "The moving average, where the run keeps one.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it wrote."""
    if len(args) != 1:
        raise UserError(f"expected one RUN, got {len(args)}; usage: cv2jax export {USAGE}")
    values = flags.flag_values_dict()
    target, out, step, ema = (values.pop(name) for name in ("to", "out", "step", "ema"))
    for name, value in (("to", target), ("out", out)):
        if value is None:
            raise UserError(f"--{name} is missing; usage: cv2jax export {USAGE}")
    from cv2jax.jobs.export import ExportOptions, export

    result = export(args[0], target, out, options=ExportOptions(**values), step=step, ema=ema)
    averaged = ", moving average" if result.averaged else ""
    print(f"{out}: {target}, step {result.step}{averaged}, {result.num_parameters / 1e6:.3f} M parameters")
    return 0
