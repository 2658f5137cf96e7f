"""Compare variants under one budget: quantizers of the speech tokenizer (the paper's Table 4), or masks of the flow.

    cv2jax ablate quantizer --corpus prepared/ --workdir runs/ablation --set num_steps=400 --seeds 0,1
    cv2jax ablate masks --corpus prepared/ --workdir runs/masks --set data.speech_tokens=tokens.jsonl

Writes table.md, table.png and table.json into --workdir. Calling it again goes on where it stopped.
"""

from absl import flags

from cv2jax.config import UserError

USAGE = "quantizer|masks --corpus DIR --workdir DIR [--config NAME] [--seeds 0,1,...] [--set key=value]..."


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    flags.DEFINE_string("corpus", None, "prepared corpus", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the runs and the table go", flag_values=values)
    flags.DEFINE_string(
        "config",
        None,
        "preset or file that every run starts from; by default speech_tokenizer_tiny or flow_matching_tiny",
        flag_values=values,
    )
    flags.DEFINE_list("seeds", ["0"], "seeds of initialisation, order and draws", flag_values=values)
    flags.DEFINE_multi_string("set", [], "config override key=value; may be repeated", flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Runs the ablation and prints its table."""
    if args not in (["quantizer"], ["masks"]):
        raise UserError(f"expected 'quantizer' or 'masks', got '{' '.join(args)}'; usage: cv2jax ablate {USAGE}")
    for name in ("corpus", "workdir"):
        if values[name].value is None:
            raise UserError(f"--{name} is missing; usage: cv2jax ablate {USAGE}")
    seeds = values.seeds
    if not seeds or not all(seed.strip().isdecimal() for seed in seeds):
        raise UserError(f"--seeds {','.join(seeds)}: give whole numbers separated by commas, for example 0,1,2")
    assignments = [f"data.corpus={values.corpus}", *values.set]
    if args == ["masks"]:
        if len(seeds) > 1:
            raise UserError(f"--seeds {','.join(seeds)}: the masks are compared with one seed")
        from cv2jax.jobs.ablate_masks import ablate_masks

        assignments.append(f"seed={int(seeds[0])}")
        code, table = ablate_masks(values.config or "flow_matching_tiny", values.workdir, assignments=assignments)
    else:
        from cv2jax.jobs.ablate import ablate_quantizer

        config = values.config or "speech_tokenizer_tiny"
        numbers = [int(seed) for seed in seeds]
        code, table = ablate_quantizer(config, values.workdir, seeds=numbers, assignments=assignments)
    if table:
        print(table)
    return code
