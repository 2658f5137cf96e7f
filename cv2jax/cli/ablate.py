"""Compare variants under one budget: `ablate quantizer` trains fsq, vq and none and writes the paper's Table 4.

    cv2jax ablate quantizer --corpus prepared/ --workdir runs/ablation --set num_steps=400 --seeds 0,1

Writes table.md, table.png and table.json into --workdir. Calling it again goes on where it stopped.
"""

from absl import flags

from cv2jax.config import UserError

USAGE = "quantizer --corpus DIR --workdir DIR [--config NAME] [--seeds 0,1,...] [--set key=value]..."


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    flags.DEFINE_string("corpus", None, "prepared corpus", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the runs and the table go", flag_values=values)
    flags.DEFINE_string(
        "config", "speech_tokenizer_tiny", "preset or file that every run starts from", flag_values=values
    )
    flags.DEFINE_list("seeds", ["0"], "seeds of initialisation, order and draws", flag_values=values)
    flags.DEFINE_multi_string("set", [], "config override key=value; may be repeated", flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Runs the ablation and prints its table."""
    if args != ["quantizer"]:
        raise UserError(f"expected 'quantizer', got '{' '.join(args)}'; usage: cv2jax ablate {USAGE}")
    for name in ("corpus", "workdir"):
        if values[name].value is None:
            raise UserError(f"--{name} is missing; usage: cv2jax ablate {USAGE}")
    seeds = values.seeds
    if not seeds or not all(seed.strip().isdecimal() for seed in seeds):
        raise UserError(f"--seeds {','.join(seeds)}: give whole numbers separated by commas, for example 0,1,2")
    from cv2jax.jobs.ablate import ablate_quantizer

    code, table = ablate_quantizer(
        values.config,
        values.workdir,
        seeds=[int(seed) for seed in seeds],
        assignments=[f"data.corpus={values.corpus}", *values.set],
    )
    if table:
        print(table)
    return code
