"""Try a bundle on this machine: does every stage still say what the model in float32 said?

BUNDLE is a directory of `cv2jax export --to bundle`. Every file is checked against its SHA-256; then each stage is asked the
small question that lies in BUNDLE/golden, in its own programs on this process's first device, and the answer is compared:
token ids one by one, mel, waveform and logits by their relative error. A table shows error and bound; the first stage that
drifts is named, and the exit code is 2. Of each stage the programs of the sizes that the question needs run, not all.

  cv2jax selftest bundles/mine
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "BUNDLE"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags: none."""
    del flags


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job, prints its table, and names the first stage that drifts."""
    del flags
    if len(args) != 1:
        raise UserError(f"expected one BUNDLE, got {len(args)}; usage: cv2jax selftest {USAGE}")
    from cv2jax.jobs.selftest import selftest
    from cv2jax.synthesis.gate import format_checks

    report = selftest(args[0])
    print(format_checks(report.checks))
    if report.drift is not None:
        drift = report.drift
        raise UserError(
            f"{args[0]}: {drift.stage} drifts first ({drift.quantity}: relative error {drift.error:.2e}, bound"
            f" {drift.bound}); do not serve with it here: export it again on this machine, or report it"
        )
    print(f"{args[0]}: passes in {report.seconds:.1f} s, of which {report.check_seconds:.1f} s to check all files")
    return 0
