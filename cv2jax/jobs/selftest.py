"""`cv2jax selftest`: asks a bundle's stages, on this machine, what the fp32 model was asked, and compares."""

import dataclasses
import os
import time
from collections.abc import Callable

from cv2jax.synthesis.bundle import load_bundle
from cv2jax.synthesis.gate import Check, first_drift, run_gate


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestReport:
    """What came of it: every check, the first that does not pass, and seconds: to read and check all files, and in all."""

    checks: list[Check]
    drift: Check | None
    check_seconds: float
    seconds: float


def selftest(bundle: str | os.PathLike[str], on_check: Callable[[Check], None] | None = None) -> SelftestReport:
    """Runs the numeric gate of a bundle on this process's first device; `on_check` is told of each check.

    Raises UserError as `load_bundle`.
    """
    start = time.perf_counter()
    loaded, checks = load_bundle(bundle), []
    for check in run_gate(bundle, loaded):
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return SelftestReport(
        checks=checks,
        drift=first_drift(checks),
        check_seconds=loaded.facts.check_seconds,
        seconds=time.perf_counter() - start,
    )
