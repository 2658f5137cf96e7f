"""The table of the mask ablation: mel distance of each trained model under each mask, and what each mask costs a stream."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class MaskTimes:
    """Of a stream in hops of one chunk; None for a mask that cannot stream."""

    first_tokens: int | None  # speech tokens that the first audio needs, look-ahead included
    first_seconds: float | None
    hop_seconds: float | None  # of a hop with some seconds of sound before it


Distances = Mapping[str, Mapping[str, float]]  # trained for → mask at inference → mean |difference| of log-mel


def table_rows(distances: Distances, times: Mapping[str, MaskTimes]) -> list[list[str]]:
    """A row a model, a column a mask, and the times of each mask below; the best of a column has a star."""
    masks = list(times)
    best = {mask: min(row[mask] for row in distances.values()) for mask in masks}
    cell = lambda row, mask: f"{row[mask]:.4f}{' *' if row[mask] == best[mask] else ''}"  # noqa: E731
    rows = [[f"trained: {name}", *(cell(row, mask) for mask in masks)] for name, row in distances.items()]
    show = lambda value, form: "–" if value is None else form.format(value)  # noqa: E731
    rows.append(["first audio: tokens", *(show(times[m].first_tokens, "{}") for m in masks)])
    for label, field in (("first audio: solve, ms", "first_seconds"), ("hop after 5 s, ms", "hop_seconds")):
        seconds = [getattr(times[m], field) for m in masks]
        rows.append([label, *(show(None if s is None else 1000 * s, "{:.1f}") for s in seconds)])
    return rows


def masks_table(distances: Distances, times: Mapping[str, MaskTimes], caption: str) -> str:
    """The table as Markdown under its caption."""
    head = ["", *(f"heard under {mask}" for mask in times)]
    lines = [caption, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(distances, times)]
    return "\n".join(lines) + "\n"


def draw_masks_table(distances: Distances, times: Mapping[str, MaskTimes], caption: str) -> bytes:
    """PNG: a line a model over the masks at inference, and the seconds of a hop."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    masks = list(times)
    for name, row in distances.items():
        left.plot(masks, [row[mask] for mask in masks], marker="o", linewidth=2.5 if name == "mixed" else 1, label=name)
    left.set_xlabel("mask at inference")
    left.set_ylabel("mel distance, held out")
    left.legend(title="trained for", fontsize=8)
    streaming = {mask: t.hop_seconds for mask, t in times.items() if t.hop_seconds is not None}
    right.bar(list(streaming), [1000 * value for value in streaming.values()], color="#4878a8")
    right.set_ylabel("ms a hop of one chunk, after 5 s")
    figure.suptitle(caption, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
