"""The report of `cv2jax prepare`: what was kept, refused and why, and warned of; as JSON (all of it) and Markdown."""

import dataclasses
import io
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cv2jax.data.corpus_index import write_bytes
from cv2jax.data.manifest import Refusal

_SHOWN = 100  # lines of each list in report.md
# Numbers and quoted names differ from line to line; without them equal reasons add up.
_VARYING = re.compile(r"^[^ ]*[/.][^ ]*: |'[^']*'|\"[^\"]*\"|[-+]?\d+(\.\d+)?")


def write_report(
    root: str | os.PathLike[str],
    *,
    manifest: str | os.PathLike[str],
    kept: dict[str, dict[str, Any]],
    refused: tuple[Refusal, ...],
    notes: list[pathlib.Path],
) -> bool:
    """Writes report.json and report.md from refused manifest lines and the shards' notes; False where both stood so.

    `kept` gives `num_utterances` and `seconds` per split. The report says nothing of times and machines: equal input
    gives equal bytes.
    """
    root = pathlib.Path(root)
    refusals = [dataclasses.asdict(refusal) for refusal in refused]
    warnings: list[dict[str, Any]] = []
    for note in _read_notes(notes):
        refusals.extend(note["refused"])
        warnings.extend(note["warnings"])
    refusals.sort(key=lambda refusal: refusal["line"])
    warnings.sort(key=lambda warning: warning["line"])
    report = {
        "manifest": os.path.basename(manifest),
        "kept": kept,
        "num_refused": len(refusals),
        "num_warnings": len(warnings),
        "refused": refusals,
        "warnings": warnings,
    }
    # One entry a line: a report of many thousand refusals can still be searched with grep.
    text = io.StringIO()
    for name, value in report.items():
        text.write("{\n" if name == "manifest" else ",\n")
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
            text.write(f' "{name}": [\n  {rows}\n ]')
        else:
            text.write(f' "{name}": {json.dumps(value, ensure_ascii=False)}')
    text.write("\n}\n")
    changed = write_bytes(root / "report.json", text.getvalue().encode())
    return write_bytes(root / "report.md", _markdown(report).encode()) or changed


def _read_notes(notes: list[pathlib.Path]) -> Iterator[dict[str, Any]]:
    for path in notes:
        yield json.loads(path.read_text(encoding="utf-8"))


def _markdown(report: dict[str, Any]) -> str:
    parts = [
        f"# Preparation of {report['manifest']}\n",
        "| split | utterances | hours |",
        "|---|---:|---:|",
        *(f"| {s} | {k['num_utterances']} | {k['seconds'] / 3600:.3f} |" for s, k in report["kept"].items()),
        "",
        *_section("Refused", report["refused"], "reason"),
        *_section("Warnings (kept all the same)", report["warnings"], "warning"),
    ]
    return "\n".join(parts) + "\n"


def _section(title: str, rows: list[dict[str, Any]], key: str) -> Iterator[str]:
    yield f"## {title}: {len(rows)}\n"
    if not rows:
        return
    for reason, count in Counter(_VARYING.sub("…", row[key]) for row in rows).most_common(20):
        yield f"- {count} × {reason}"
    yield f"\n| line | id | {key} |\n|---:|---|---|"
    for row in rows[:_SHOWN]:
        yield f"| {row['line']} | {_cell(row['id'])} | {_cell(row[key])} |"
    if len(rows) > _SHOWN:
        yield f"\n… and {len(rows) - _SHOWN} more in report.json"
    yield ""


def _cell(value: str | None) -> str:
    return (value or "").replace("|", "\\|").replace("\n", " ")
