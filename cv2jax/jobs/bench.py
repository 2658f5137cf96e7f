"""`cv2jax bench`: how fast each part is here, as a Markdown table and JSON; each part runs in a process of its own.

This file starts the processes and needs no jax; what they do is in `bench_parts.py` and, for some, in `bench_flow.py`,
`bench_vocoder.py` and `bench_synth.py`. One process a part, so that its peak memory is its own, and a compilation or an
allocator of one part does not disturb the next.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

import cv2jax
from cv2jax.config import UserError
from cv2jax.jobs.bench_options import SIZES, BenchOptions, Measurement

FLOW_BENCHES = ("flow-train", "flow-offline", "flow-stream")
BENCHES = (
    "prepare",
    "encode",
    "train",
    "loader",
    "lm-train",
    "lm-decode",
    *FLOW_BENCHES,
    "vocoder",
    "synth",
    "overhead",
)
_MODULES = {**dict.fromkeys(FLOW_BENCHES, "bench_flow"), "vocoder": "bench_vocoder", "synth": "bench_synth"}
_RACES = ("lm-train", "lm-decode", "flow-offline")  # against PyTorch


def bench(what: str, options: BenchOptions, out: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Measures one of BENCHES, or "all", and returns (and writes to `out`) the report as plain values for JSON.

    Raises UserError for unknown names and options, and where a part fails.
    """
    options.validate()
    if what != "all" and what not in BENCHES:
        raise UserError(f"'{what}' is no benchmark; choose one of {', '.join((*BENCHES, 'all'))}")
    if what in _RACES and options.against and importlib.util.find_spec("torch") is None:
        mend = "pip install 'cv2jax[official]', or measure ours alone with --against ''"
        raise UserError(f"bench {what}: PyTorch, to compare with, is not installed: {mend}")
    if out is not None:
        _check_writable(pathlib.Path(out))
    machine: dict[str, Any] = {}
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="cv2jax-bench-") as place:
        scratch, used = pathlib.Path(place), options
        if importlib.util.find_spec("torch") is None:
            used = dataclasses.replace(options, against="")  # of `all`, which needs no extra
        for part in _parts(what, options):
            print(f"bench: {part}", file=sys.stderr, flush=True)
            result = _run_part(part, used, scratch / part.replace(":", "-"))
            machine |= result["machine"]
            measurements += [Measurement(**m | {"values": tuple(m["values"])}) for m in result["measurements"]]
            if part == "corpus":
                used = dataclasses.replace(used, corpus=str(scratch / part / "prepared"))
    report = {
        "cv2jax": cv2jax.__version__,
        "machine": {"processor": _processor(), "cores": _num_cores(), **machine},
        "options": dataclasses.asdict(options),
        "measurements": [_describe(m) for m in measurements],
    }
    if out is not None:
        path = pathlib.Path(out)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    return report


def format_table(report: dict[str, Any]) -> str:
    """The report for people: a line on the machine, then a Markdown table of medians, ranges and peak memory."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"cv2jax {report['cv2jax']} on {machine}; medians of {report['options']['repeats']}",
        "",
        "| bench | case | median | unit | range | peak memory MB | device memory MB |",
        "|---|---|---:|---|---|---:|---:|",
    ]
    for m in report["measurements"]:
        low, high = min(m["values"]), max(m["values"])
        memory = ["–" if m[key] is None else f"{m[key]:.0f}" for key in ("peak_memory_mb", "device_memory_mb")]
        cells = [m["bench"], m["case"], f"{m['median']:.4g}", m["unit"], f"{low:.4g}–{high:.4g}", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _check_writable(out: pathlib.Path) -> None:
    """UserError unless a file can be made there: measuring takes minutes."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a directory; give a file for the JSON")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); give another file") from None


def _describe(measurement: Measurement) -> dict[str, Any]:
    return dataclasses.asdict(measurement) | {"median": measurement.median}


def _parts(what: str, options: BenchOptions) -> list[str]:
    """The processes to start: encode has one a size; train and loader share a corpus that another one makes."""
    parts: list[str] = []
    for name in BENCHES if what == "all" else (what,):
        if name in ("train", "loader", "overhead") and not options.corpus and "corpus" not in parts:
            parts.append("corpus")
        parts += [f"encode:{size}" for size in SIZES if options.size in ("", size)] if name == "encode" else [name]
        if name == "loader" and options.utterances:
            parts.append("index")
    return parts


def _run_part(part: str, options: BenchOptions, place: pathlib.Path) -> dict[str, Any]:
    place.mkdir()
    command = [
        sys.executable,
        "-m",
        f"cv2jax.jobs.{_MODULES.get(part, 'bench_parts')}",
        part,
        json.dumps(dataclasses.asdict(options)),
        str(place),
    ]
    root = str(pathlib.Path(cv2jax.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Whatever a part prints goes to stderr: stdout is for the table.
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=2, check=False)
    result = place / "result.json"
    if process.returncode or not result.is_file():
        hint = "see above" if process.returncode > 0 else f"ended by signal {-process.returncode}: out of memory?"
        raise UserError(f"bench {part} failed ({hint}); nothing was reported")
    return json.loads(result.read_text(encoding="utf-8"))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
