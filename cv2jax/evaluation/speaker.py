"""Held-out metrics of a speaker encoder: how well the cosine of two utterances tells whether one person spoke both."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MAX_UTTERANCES = 3000  # whose pairs are all compared: 4.5 million
NUM_BINS = 80
_NAMED = 8  # speakers with a single utterance


def equal_error_rate(same: Float[np.ndarray, " P"], different: Float[np.ndarray, " Q"]) -> tuple[float, float]:
    """(share of errors, threshold) where as many same pairs score below the threshold as different ones at or above it.

    Between two scores the two rates are taken as straight lines. Raises ValueError where there is no pair of either kind.
    """
    if not len(same) or not len(different):
        raise ValueError("an equal-error rate needs pairs of the same and of different speakers")
    same, different = np.sort(same), np.sort(different)
    scores = np.unique(np.concatenate([same, different]))
    thresholds = np.append(scores, np.nextafter(scores[-1], np.inf))
    misses = np.searchsorted(same, thresholds, "left") / len(same)
    alarms = 1 - np.searchsorted(different, thresholds, "left") / len(different)
    at = int(np.argmax(misses >= alarms))  # never 0: at the lowest score nothing is missed and everything let through
    gap_before, gap = alarms[at - 1] - misses[at - 1], misses[at] - alarms[at]
    share = gap_before / (gap_before + gap)
    rate = misses[at - 1] + share * (misses[at] - misses[at - 1])
    return float(rate), float(thresholds[at - 1] + share * (thresholds[at] - thresholds[at - 1]))


class SpeakerScore:
    """Gathers embeddings over batches; `speakers` are the names that the numbers stand for."""

    def __init__(self, speakers: Sequence[str], seed: int = 0) -> None:
        self._names, self._seed = speakers, seed
        self._vectors: list[np.ndarray] = []
        self._speakers: list[np.ndarray] = []
        self._num_left_out = 0

    def add(
        self,
        embedding: Float[np.ndarray, "B E"],
        speaker: Int[np.ndarray, " B"],
        row_mask: np.ndarray,
        usable: np.ndarray,
    ) -> None:
        """One batch; a row that is not `usable` (silent, or too short) is counted and left out."""
        kept = row_mask & usable & np.isfinite(embedding).all(axis=1)
        self._num_left_out += int(np.sum(row_mask & ~kept))
        self._vectors.append(embedding[kept])
        self._speakers.append(speaker[kept])

    def metrics(self) -> dict[str, Any]:
        """`eer` and the mean cosines over all pairs (of whole speakers drawn by the seed beyond MAX_UTTERANCES), counts, the
        scores' distribution, and the speakers that have one utterance, which makes no pair of theirs."""
        vectors, speakers = np.concatenate(self._vectors), np.concatenate(self._speakers)
        chosen = _choose(speakers, self._seed)
        same, different = pair_scores(vectors[chosen], speakers[chosen])
        names, counts = np.unique(speakers, return_counts=True)
        lone = [self._names[i] for i in names[counts == 1].tolist()]
        found: dict[str, Any] = {}
        if len(same) and len(different):
            rate, threshold = equal_error_rate(same, different)
            found = {"eer": rate, "threshold": threshold}
        for kind, scores in (("same", same), ("different", different)):
            if len(scores):
                found[f"{kind}_cosine"] = float(scores.mean(dtype=np.float64))
        return found | {
            "num_same_pairs": len(same),
            "num_different_pairs": len(different),
            "num_utterances": len(speakers),
            "num_speakers": len(names),
            "num_left_out": self._num_left_out,
            "num_lone_speakers": len(lone),
            "lone_speakers": lone[:_NAMED],
            "score_distribution": {"same": _shares(same), "different": _shares(different)},
        }


def pair_scores(
    embedding: Float[np.ndarray, "N E"], speaker: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " Q"]]:
    """Cosines of all pairs of utterances: of one speaker, and of two."""
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit = embedding / np.maximum(norms, 1e-12)
    first, second = np.triu_indices(len(unit), 1)
    scores, is_same = (unit @ unit.T)[first, second], speaker[first] == speaker[second]
    return scores[is_same], scores[~is_same]


def _choose(speakers: Int[np.ndarray, " N"], seed: int) -> Int[np.ndarray, " K"]:
    """Rows of whole speakers in an order of the seed's, up to MAX_UTTERANCES."""
    if len(speakers) <= MAX_UTTERANCES:
        return np.arange(len(speakers))
    rank = np.random.default_rng(seed).permutation(int(speakers.max()) + 1)
    return np.argsort(rank[speakers], kind="stable")[:MAX_UTTERANCES]


def _shares(scores: Float[np.ndarray, " P"]) -> list[float]:
    counts, _ = np.histogram(np.clip(scores, -1, 1), NUM_BINS, (-1, 1))
    return (counts / max(len(scores), 1)).round(6).tolist()


def draw_scores(distribution: Mapping[str, Sequence[float]], threshold: float | None = None) -> bytes:
    """PNG: how the cosines of pairs of one speaker and of two are distributed, and where as many of either err."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = np.linspace(-1, 1, NUM_BINS + 1)
    for kind in ("same", "different"):
        axes.stairs(distribution[kind], edges, fill=True, alpha=0.6, label=f"{kind} speaker")
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1, linestyle="--", label="equal error")
    axes.set_xlabel("cosine")
    axes.set_ylabel("share of the pairs")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
