"""Read an official CosyVoice 2 model directory into a model directory: one run a stage, to fine-tune and to speak with.

    cv2jax import CosyVoice2-0.5B --from official --to model/
    cv2jax train text_speech_lm_official --corpus tokens/ --workdir runs/lm --set init_from=model/text_speech_lm

Nothing in the directory is run: cosyvoice2.yaml is read as data, .pt files as tensors only. What has no counterpart here is
kept under model/official/, so that `cv2jax export model/ --to official` gives the same directory again. Voices of
spk2info.pt come to lie in model/voices/. Needs the extra: pip install 'cv2jax[official]'.
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "DIR --from official --to WORKDIR"
FORMS = ("official",)


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    absl_flags.DEFINE_string("from", None, "Form of DIR: official.", flag_values=flags)
    absl_flags.DEFINE_string("to", None, "New model directory.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it made."""
    values = flags.flag_values_dict()
    if len(args) != 1:
        raise UserError(f"expected one DIR, got {len(args)}; usage: cv2jax import {USAGE}")
    for name in ("from", "to"):
        if values[name] is None:
            raise UserError(f"--{name} is missing; usage: cv2jax import {USAGE}")
    if values["from"] not in FORMS:
        raise UserError(f"--from {values['from']}: there is no such form; choose {' or '.join(FORMS)}")
    from cv2jax.jobs.import_official import import_official

    result = import_official(args[0], values["to"])
    voices = f", {len(result.voices)} voices" if result.voices else ""
    print(f"{values['to']}: {', '.join(result.stages)}{voices}, {result.num_parameters / 1e6:.3f} M parameters")
    return 0
