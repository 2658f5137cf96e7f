"""One self-contained HTML page for a training run: what it reached, its curves, its codebook, what it heard."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cv2jax.evaluation.flow import draw_spectrograms
from cv2jax.evaluation.speaker import draw_scores

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #eee;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}pre{font-size:12px;background:#f7f7f7;padding:1em;overflow:auto}
.bad{color:#a00}"""


def training_page(
    *,
    title: str,
    summary: Mapping[str, str],
    curves_png: bytes,
    evaluations: Sequence[Mapping[str, Any]],
    config_text: str,
    notes: Sequence[str] = (),
) -> str:
    """HTML of a run.

    Args:
      summary: name → value, shown first. curves_png: the run's curves. evaluations: held-out lines of metrics.jsonl in
        order, of which the last may carry `examples` [[reference, recognised], …] and `digit_histogram` [8][3], and
        `spectrograms` of `evaluation.flow.pack_spectrograms`, and `score_distribution` of `evaluation.speaker`.
      config_text: printed whole. notes: paragraphs under the summary.
    """
    last = evaluations[-1] if evaluations else {}
    parts = [f"<h1>{html.escape(title)}</h1>", _table(("", ""), summary.items())]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    parts += ["<h2>Curves</h2>", _image(curves_png, "training and held-out curves")]
    if last.get("codes_used"):
        parts += ["<h2>Codebook</h2>", _image(draw_codebook(evaluations), "use of the codebook")]
    if last.get("spectrograms"):
        parts += [
            "<h2>Held-out mel</h2>",
            _image(draw_spectrograms(last["spectrograms"]), "spectrograms, the truth first"),
        ]
    if last.get("score_distribution"):
        picture = draw_scores(last["score_distribution"], last.get("threshold"))
        parts += ["<h2>Held-out pairs</h2>", _image(picture, "cosines of pairs of one speaker and of two")]
    if last.get("examples"):
        parts.append("<h2>Heard on held-out speech</h2>")
        parts.append(_table(("spoken", "recognised"), last["examples"]))
    parts += ["<h2>Config</h2>", f"<pre>{html.escape(config_text)}</pre>"]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def draw_codebook(evaluations: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: codes used and perplexity over training, and the level shares of each FSQ digit at the end, if it has digits."""
    steps = [line["step"] for line in evaluations]
    histogram = evaluations[-1].get("digit_histogram")
    figure = Figure(figsize=(10 if histogram else 5, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot(1, 2 if histogram else 1, 1)
    left.plot(steps, [line["codes_used"] for line in evaluations], marker=".", label="codes used")
    left.plot(steps, [line["perplexity"] for line in evaluations], marker=".", label="perplexity")
    left.set_xlabel("step")
    left.set_title("codes on held-out speech", fontsize=10)
    left.legend()
    if histogram:
        _draw_digits(figure.add_subplot(1, 2, 2), histogram)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_digits(axes: Any, histogram: Sequence[Sequence[float]]) -> None:
    """Stacked bars, one an FSQ digit, of the shares of its three levels."""
    bottom = [0.0] * len(histogram)
    for level, name in enumerate(("-1", "0", "+1")):
        shares = [row[level] for row in histogram]
        axes.bar(range(len(histogram)), shares, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    axes.set_title("share of each level by FSQ digit", fontsize=10)
    axes.set_xlabel("digit")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars, which fill the axes


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = []
    for left, right in rows:
        mark = ' class="bad"' if head[0] and left != right else ""
        lines.append(f"<tr><td>{html.escape(str(left))}</td><td{mark}>{html.escape(str(right))}</td></tr>")
    top = f"<tr><th>{head[0]}</th><th>{head[1]}</th></tr>" if head[0] else ""
    return f"<table>{top}{''.join(lines)}</table>"


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
