"""Held-out metrics of a language model: its teacher-forced means, and what it does when it runs freely."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

CLOSE = 0.25  # a length that differs by at most this share of the reference's
_COUNTS = ("num_targets", "num_eos", "num_speech", "num_digits", "expected_eos")  # summed, where the others are means


def mean_metrics(batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of a set from those of its batches: counts are summed, each mean weighs as much as it is a mean of."""
    names = [name for name in batches[0] if np.ndim(batches[0][name]) == 0]
    values = {name: np.array([batch[name] for batch in batches], np.float64) for name in names}

    def mean(name: str) -> float:
        weights = values[_count_of(name)]
        return float(np.sum(values[name] * weights) / max(weights.sum(), 1))

    return {name: float(values[name].sum()) if name in _COUNTS else mean(name) for name in names}


def _count_of(name: str) -> str:
    if name.startswith("digit_accuracy"):
        return "num_digits"
    return {"eos_probability_at_eos": "num_eos", "eos_probability_at_speech": "num_speech"}.get(name, "num_targets")


def free_running_metrics(
    generated: Sequence[Integer[np.ndarray, "_"]],
    statuses: Sequence[str],
    references: Sequence[Integer[np.ndarray, "_"]],
) -> dict[str, Any]:
    """Metrics of speech tokens that were generated for the texts of `references`.

    `length_error` (mean of |length / reference - 1|), `length_close` (share within CLOSE), `repetition_rate` (share of
    tokens that repeat the one before; speech has some, `reference_repetition_rate`), `longest_run` of one token,
    `hit_limit` and `non_finite` (requests that ended so).
    """
    if not len(generated) == len(statuses) == len(references) > 0:
        raise ValueError(f"{len(generated)} results and {len(statuses)} statuses for {len(references)} references")
    errors = np.array([abs(len(g) / max(len(r), 1) - 1) for g, r in zip(generated, references, strict=True)])
    return {
        "length_error": float(errors.mean()),
        "length_close": float((errors <= CLOSE).mean()),
        "repetition_rate": _repetition_rate(generated),
        "reference_repetition_rate": _repetition_rate(references),
        "longest_run": max(map(_longest_run, generated)),
        "hit_limit": sum(status == "hit_limit" for status in statuses),
        "non_finite": sum(status == "non_finite" for status in statuses),
    }


def _repetition_rate(tokens: Sequence[Integer[np.ndarray, "_"]]) -> float:
    pairs = sum(max(len(row) - 1, 0) for row in tokens)
    return sum(int(np.sum(row[1:] == row[:-1])) for row in tokens) / max(pairs, 1)


def _longest_run(tokens: Integer[np.ndarray, " L"]) -> int:
    if not len(tokens):
        return 0
    starts = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]]))
    return int(np.max(np.diff(np.append(starts, len(tokens)))))
