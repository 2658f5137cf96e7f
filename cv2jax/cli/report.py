"""Write the page of a training run: error rates, curves, codebook, what it heard.

cv2jax report runs/tokenizer      # writes runs/tokenizer/report.html
"""

from absl import flags

from cv2jax.config import UserError

USAGE = "RUN"


def define_flags(values: flags.FlagValues) -> None:
    """This verb has no flags of its own."""
    del values


def main(args: list[str], values: flags.FlagValues) -> int:
    """Writes the page and prints where it is."""
    del values
    if len(args) != 1:
        raise UserError(f"expected one RUN, got {len(args)}; usage: cv2jax report {USAGE}")
    from cv2jax.jobs.report import write_report

    print(write_report(args[0]))
    return 0
