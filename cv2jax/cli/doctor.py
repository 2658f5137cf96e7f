"""Look at a training run, finished or at work, and name its likely faults: the evidence and the mend, the likeliest first.

    cv2jax doctor runs/lm --out doctor.png
    cv2jax doctor runs/lm --against runs/other     # also the first step at which the two read other batches

It knows: a run that is stopped, dead or stuck; non-finite steps and the utterances that repeat in them; tokens that do not
belong to their texts or audio; a learning rate too high or too low; waiting for data; slow saves; padding beyond the plan;
a codebook that dies; overfitting; a throughput that dropped; missing evaluations; damaged checkpoints; values outside the
config's own figures. Exit code 0: nothing found; 4: findings; 2: no run, or its record cannot be read.
"""

import pathlib

from absl import flags

from cv2jax.config import UserError

USAGE = "RUN [--out PNG] [--against RUN]"
EXIT_FINDINGS = 4


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    flags.DEFINE_string("out", "", "PNG of the run's curves, with the places of the findings", flag_values=values)
    text = "Workdir of a run that should have read the same batches, step by step"
    flags.DEFINE_string("against", "", text, flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Prints one line a finding; EXIT_FINDINGS where there is one."""
    if len(args) != 1:
        raise UserError(f"expected one RUN, got {len(args)}; usage: cv2jax doctor {USAGE}")
    from cv2jax.jobs.doctor import diagnose, summarise
    from cv2jax.jobs.doctor_chart import write_chart

    run, findings = diagnose(args[0], against=values.against)
    print(summarise(run))
    for number, finding in enumerate(findings, start=1):
        print(f"{number}. {finding}")
    if not findings:
        print("nothing found")
    if values.out:
        write_chart(run, findings, pathlib.Path(values.out))
        print(f"curves: {values.out}")
    return EXIT_FINDINGS if findings else 0
