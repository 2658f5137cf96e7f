"""The table of an ablation: one row a variant, mean over seeds, as Markdown and as a picture (paper, Table 4)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """Held-out figures of one variant, one entry a seed; a variant without a codebook has size 0."""

    name: str
    codebook_size: int
    character_error_rates: tuple[float, ...]
    word_error_rates: tuple[float, ...]
    codes_used: tuple[int, ...]
    perplexities: tuple[float, ...]
    num_speech_tokens: int  # of the held-out speech: no more codes than this can be seen


HEAD = ("quantizer", "size", "codes used", "share", "perplexity", "CER %", "WER %")


def table_rows(results: Sequence[VariantResult]) -> list[tuple[str, ...]]:
    """Cells under `HEAD`; several seeds show as mean ± standard deviation."""
    rows: list[tuple[str, ...]] = []
    for r in results:
        coded = r.codebook_size > 0
        rows.append(
            (
                r.name,
                f"{r.codebook_size:,}" if coded else "–",
                _spread(r.codes_used, "{:.0f}") if coded else "–",
                f"{100 * np.mean(r.codes_used) / r.codebook_size:.1f} %" if coded else "–",
                _spread(r.perplexities, "{:.0f}") if coded else "–",
                _spread([100 * x for x in r.character_error_rates], "{:.2f}"),
                _spread([100 * x for x in r.word_error_rates], "{:.2f}"),
            )
        )
    return rows


def markdown_table(results: Sequence[VariantResult], caption: str) -> str:
    """The table as Markdown under its caption."""
    lines = [caption, "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(results)]
    return "\n".join(lines) + "\n"


def draw_table(results: Sequence[VariantResult], caption: str) -> bytes:
    """PNG: the table, and bars of error rate and of codes used below it."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, left, right = (figure.add_subplot(2, 1, 1), figure.add_subplot(2, 2, 3), figure.add_subplot(2, 2, 4))
    top.axis("off")
    table = top.table(cellText=table_rows(results), colLabels=HEAD, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.4)
    top.set_title(caption, fontsize=9)
    names = [r.name for r in results]
    left.bar(names, [100 * float(np.mean(r.character_error_rates)) for r in results], color="#4878a8")
    left.set_ylabel("held-out CER, %")
    coded = [r for r in results if r.codebook_size]
    right.bar(
        [r.name for r in coded], [float(np.mean(r.codes_used)) for r in coded], color="#a86048", label="codes used"
    )
    right.bar(
        [r.name for r in coded],
        [float(np.mean(r.perplexities)) for r in coded],
        width=0.4,
        color="#e0b090",
        label="perplexity",
    )
    right.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _spread(values: Sequence[float] | Sequence[int], form: str) -> str:
    text = form.format(float(np.mean(values)))
    return text if len(values) == 1 else f"{text} ± {form.format(float(np.std(values, ddof=1)))}"
