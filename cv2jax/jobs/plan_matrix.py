"""Every official stage on every machine: a process and a JSON file a cell, so that a matrix of hours can be stopped."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl import logging

import cv2jax
from cv2jax.config import UserError
from cv2jax.jobs.plan_compile import versions
from cv2jax.jobs.plan_report import Report, markdown
from cv2jax.parallel.presets import find_preset

STAGES = ("speech_tokenizer", "text_speech_lm", "flow_matching", "hift_vocoder", "speaker_encoder")
MACHINES = ("v5e-16", "v5e-256", "v5p-128", "v6e-256", "2xv5e-256")
BASE_CHIPS = 16  # that the official configs' batches are for
SCALING = ("v5e-16", "v5e-256")  # weak scaling: the same batch a chip
_DONE = (0, 4)  # exit codes of a process that wrote its cell


@dataclasses.dataclass(frozen=True)
class Cell:
    """One stage on one machine."""

    stage: str
    machine: str

    @property
    def scale(self) -> float:
        """Of the global batch: the same for each chip as on 16."""
        return find_preset(self.machine).num_chips / BASE_CHIPS

    def command(self, file: pathlib.Path) -> list[str]:
        """What plans it in a process of its own."""
        config, machine = f"{self.stage}_official", ("--topology", self.machine)
        return ["plan", config, *machine, "--batch_scale", f"{self.scale:g}", "--json", str(file)]


def cells() -> list[Cell]:
    """All, the small machines first."""
    return [Cell(stage, machine) for machine in MACHINES for stage in STAGES]


def run(out: pathlib.Path) -> bool:
    """Plans what `out` does not hold yet, then writes matrix.json and matrix.md; whether every stage fits everywhere.

    Raises UserError, naming the cells, where a process ends without a report; the others are made all the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    reports, failed = [], []
    for number, cell in enumerate(cells(), 1):
        file = out / f"{cell.stage}.{cell.machine}.json"
        report = _read(file)
        if report is None:
            logging.info("cell %d of %d: %s on %s", number, len(cells()), cell.stage, cell.machine)
            report = _plan(cell, file)
        if report is None:
            failed.append(f"{cell.stage} on {cell.machine}")
        else:
            reports.append(report)
    (out / "matrix.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    (out / "matrix.md").write_text(table(reports), encoding="utf-8")
    print(table(reports))
    if failed:
        raise UserError(f"{len(failed)} cells gave no report, see above: {', '.join(failed)}; start again for those")
    return all(report["fits"] for report in reports)


def _plan(cell: Cell, file: pathlib.Path) -> Report | None:
    root = str(pathlib.Path(cv2jax.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    temporary = file.with_suffix(".tmp")
    command = [sys.executable, "-m", "cv2jax.cli.main", *cell.command(temporary)]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=2, check=False)
    if process.returncode not in _DONE or not temporary.is_file():
        return None
    temporary.replace(file)
    return _read(file)


def _read(file: pathlib.Path) -> Report | None:
    """The report of a cell that is there and was made by the versions of now."""
    try:
        (report,) = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("versions") == versions() else None


def table(reports: list[Report]) -> str:
    """The matrix and the weak scaling as Markdown, with versions."""
    parts = [markdown(reports), "", scaling(reports), ""]
    parts.append(", ".join(" ".join(item) for item in versions().items()))
    return "\n".join(parts) + "\n"


def scaling(reports: list[Report]) -> str:
    """What a chip has to do on 256 chips beside 16, each with the same batch."""
    lines = [
        "| stage | TFLOP a chip, 16 → 256 | GiB a chip | ICI GB a chip | step ms | utilisation |",
        "|" + "---|" * 6,
    ]
    by_cell: dict[tuple[str, str], Report] = {(one["task"], one["machine"]): one for one in reports if one["fits"]}
    for stage in STAGES:
        pair = [by_cell.get((stage, machine)) for machine in SCALING]
        if None in pair:
            continue
        values: list[Any] = [
            [f"{one['flops_a_chip'] / 1e12:.2f}" for one in pair if one],
            [f"{one['memory']['total'] / 2**30:.2f}" for one in pair if one],
            [f"{one['ici_bytes_a_chip'] / 1e9:.2f}" for one in pair if one],
            [f"{one['seconds']['step'] * 1e3:.1f}" for one in pair if one],
            [f"{one['utilisation']:.0%}" for one in pair if one],
        ]
        lines.append(f"| {stage} | " + " | ".join(" → ".join(value) for value in values) + " |")
    return "\n".join(lines)
