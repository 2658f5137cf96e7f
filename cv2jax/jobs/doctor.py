"""`cv2jax doctor RUN`: compares what a run wrote down with what its config lets expect, and names the likely faults."""

import pathlib

from cv2jax.config import UserError
from cv2jax.jobs.doctor_checks import CHECKS
from cv2jax.jobs.doctor_run import Finding, Run, open_run
from cv2jax.remote import as_path
from cv2jax.train.audit import FILE, first_difference


def diagnose(workdir: str | pathlib.Path, *, against: str = "") -> tuple[Run, list[Finding]]:
    """(the run in `workdir`, its likely faults, the likeliest first).

    Args:
      against: another run, which should have read the same batches in the same order; "" for none.

    Raises UserError where there is no run, or its record cannot be read.
    """
    run = open_run(as_path(workdir))
    findings = [finding for check in CHECKS for finding in check(run)]
    if against:
        findings += _compare(run, as_path(against))
    return run, sorted(findings, key=lambda finding: -finding.score)


def summarise(run: Run) -> str:
    """Where a run stands, in one line."""
    _, loss = run.series("loss")
    value = f", loss {loss[-1]:.4g}" if len(loss) else ""
    state = "running" if run.is_running else "finished" if run.last_step >= run.config["num_steps"] else "not running"
    return f"{run.workdir}: {run.config['name']}, {state}, step {run.last_step} of {run.config['num_steps']}{value}"


def _compare(run: Run, other: pathlib.Path) -> list[Finding]:
    for place in (run.workdir, other):
        if not (place / FILE).is_file():
            raise UserError(f"{place}: has no {FILE} to compare; it is of a release before there was one, or no run")
    difference = first_difference(run.workdir, other)
    if difference is None:
        return []
    step = int(difference.split()[1].rstrip(":"))
    mend = "compare the two run.json: corpus hash, plan hash, seed and data.* decide the order"
    evidence = f"the audits of this run and of {other} part at {difference}"
    return [Finding(fault="another data order", evidence=evidence, mend=mend, score=0.99, step=step)]
