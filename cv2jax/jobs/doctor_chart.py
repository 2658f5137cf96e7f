"""The picture of `cv2jax doctor`: a run's curves, with the places that its findings name."""

import pathlib
from typing import Any

import numpy as np

from cv2jax.files import whole_file
from cv2jax.jobs.doctor_checks import ALL, HELD_OUT, TREND
from cv2jax.jobs.doctor_run import Finding, Run

_TITLES = {
    "loss": "training",
    "evaluation": "held out",
    "gradient": "gradient norm",
    "time": "seconds a step",
    "speed": "throughput",
    "padding": "padding share",
}


def write_chart(run: Run, findings: list[Finding], path: pathlib.Path) -> None:
    """Writes a PNG: one panel a subject, a red line and the name of the fault where a finding points at."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {name: figure.add_subplot(2, 3, i + 1) for i, name in enumerate(_TITLES)}
    _draw(run, panels)
    for name, axes in panels.items():
        axes.set_title(_TITLES[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="best")
    for finding in findings:
        if finding.step is not None:
            axes = panels[finding.panel]
            axes.axvline(finding.step, color="tab:red", linewidth=1)
            place = {"xy": (finding.step, 1), "xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"}
            axes.annotate(finding.fault, **place, ha="right", fontsize=7, color="tab:red")
    heads = "\n".join(f"{i}. {str(f)[:170]}" for i, f in enumerate(findings[:5], 1)) or "no findings"
    figure.suptitle(f"{run.config['name']}, step {run.last_step} of {run.config['num_steps']}\n{heads}", fontsize=9)
    with whole_file(path, f"--out {path}: cannot write ({{reason}}); give another file") as file:
        figure.savefig(file, format="png", dpi=100)


def _draw(run: Run, panels: dict[str, Any]) -> None:
    def plot(panel: str, name: str, kind: Any = "train", label: str = "", **style: Any) -> None:
        steps, values = run.series(name, kind)
        if len(values):
            panels[panel].plot(steps, values, label=label or name, linewidth=1, **style)

    for name in dict.fromkeys(("loss", TREND.get(run.config["task"], "loss"))):
        plot("loss", name)
    for name in (*HELD_OUT, "codes_used_share"):
        plot("evaluation", name, "evaluate", marker=".")
    plot("gradient", "grad_norm")
    if len(run.series("grad_norm")[1]):
        panels["gradient"].set_yscale("log")
        panels["gradient"].axhline(run.config["optimizer.clip_norm"], color="gray", linestyle=":", label="clip_norm")
    steps = run.series(ALL[0])[0]
    parts = [run.series(name)[1] for name in ALL]
    if len(steps) and all(len(part) == len(steps) for part in parts):
        panels["time"].stackplot(steps, np.stack(parts), labels=[name.removesuffix("_seconds") for name in ALL])
    for name in ("audio_seconds_per_second", "tokens_per_second", "steps_per_second"):
        plot("speed", name)
        if len(run.series(name)[1]):
            break
    plot("padding", "padding_share")
    if run.planned_padding is not None:
        panels["padding"].axhline(run.planned_padding, color="gray", linestyle=":", label="planned")
