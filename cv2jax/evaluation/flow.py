"""Held-out metrics of a flow: its loss by time and by mask, and how far the mel it makes is from the speaker's."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TIME_BINS = 5
KINDS = ("truth", "offline", "streamed")
NUM_PICTURES = 2
_LOWEST, _HIGHEST = -11.5, 2.0  # log-mel that pictures show: silence to loud


class TokenMeans:
    """The mean mel of each speech token: what a model without any context could say."""

    def __init__(self, num_speech_tokens: int, num_mels: int) -> None:
        self._sums = np.zeros((num_speech_tokens, num_mels))
        self._counts = np.zeros(num_speech_tokens, np.int64)

    def add(
        self, tokens: Int[np.ndarray, "B L"], num_tokens: Int[np.ndarray, " B"], mel: Float[np.ndarray, "B F M"]
    ) -> None:
        """Counts the first `num_tokens` tokens of each row, of two frames each."""
        for row, count in enumerate(num_tokens.tolist()):
            ids = np.repeat(tokens[row, :count], 2)
            np.add.at(self._sums, ids, mel[row, : 2 * count])
            np.add.at(self._counts, ids, 1)

    def mel(self, tokens: Int[np.ndarray, " L"]) -> tuple[Float[np.ndarray, "F M"], Any]:
        """(the mean of each token at its two frames, which of the frames' tokens were seen at all)."""
        ids = np.repeat(tokens, 2)
        return self._sums[ids] / np.maximum(self._counts[ids], 1)[:, None], self._counts[ids] > 0


class FlowScore:
    """Sums over batches; `add` takes what the task computes for one.

    Args:
      chunks: of the trained masks, in the order of `mask_index`. means: of the training set; None: no baseline.
    """

    def __init__(self, chunks: Sequence[int], means: TokenMeans | None = None) -> None:
        self._chunks, self._means = chunks, means
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._pictures: list[dict[str, Any]] = []

    def _count(self, name: str, values: Float[np.ndarray, "..."]) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.sum(dtype=np.float64))
        self._counts[name] = self._counts.get(name, 0) + values.size

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """One batch: `error` [B F], `time` and `mask_index` [B], `speech_tokens` [B L], `num_tokens` [B], and the mel
        [B F M] `truth`, `offline`, `streamed`; a row without tokens is none."""
        for row, num_tokens in enumerate(batch["num_tokens"].tolist()):
            if not num_tokens:
                continue
            frames = slice(0, 2 * num_tokens)
            error = batch["error"][row, frames]
            self._count("loss", error)
            bin_index = min(int(batch["time"][row] * TIME_BINS), TIME_BINS - 1)
            self._count(f"loss_time_{bin_index}", error)
            self._count(f"loss_mask_{batch['mask_index'][row]}_chunk_{self._chunks[batch['mask_index'][row]]}", error)
            mel = {kind: batch[kind][row, frames] for kind in KINDS}
            for kind in KINDS[1:]:
                self._count(f"{kind}_mel_l1", np.abs(mel[kind] - mel["truth"]))
            self._count("streamed_difference", np.abs(mel["streamed"] - mel["offline"]))
            self._compare(batch["speech_tokens"][row, :num_tokens], mel)
            if len(self._pictures) < NUM_PICTURES:
                self._pictures.append(pack_spectrograms(mel))

    def _compare(self, tokens: Int[np.ndarray, " L"], mel: Mapping[str, np.ndarray]) -> None:
        if self._means is None:
            return
        constant, seen = self._means.mel(tokens)
        self._count("seen_share", seen.astype(np.float64))
        for name, guess in (("constant", constant), ("offline", mel["offline"]), ("streamed", mel["streamed"])):
            self._count(f"_{name}", np.abs(guess - mel["truth"])[seen])

    def metrics(self) -> dict[str, Any]:
        """Means over frames; `…_ratio` are mel distances over that of a constant mel a token, on tokens seen in training."""
        means = {name: self._sums[name] / max(self._counts[name], 1) for name in sorted(self._sums)}
        found: dict[str, Any] = {name: value for name, value in means.items() if not name.startswith("_")}
        if "_constant" in means:
            found["constant_mel_l1"] = means["_constant"]
            for kind in KINDS[1:]:
                found[f"{kind}_ratio"] = means[f"_{kind}"] / max(means["_constant"], 1e-9)
        return found | {"spectrograms": self._pictures}


def pack_spectrograms(mel: Mapping[str, Float[np.ndarray, "F M"]]) -> dict[str, Any]:
    """Log-mel spectrograms of equal shape as JSON: a byte a pixel."""
    scaled = {kind: np.clip((values - _LOWEST) / (_HIGHEST - _LOWEST), 0, 1) for kind, values in mel.items()}
    coded = {
        kind: base64.b64encode((255 * x).round().astype(np.uint8).tobytes()).decode() for kind, x in scaled.items()
    }
    return {"shape": list(next(iter(mel.values())).shape), **coded}


def draw_spectrograms(packed: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: a column an utterance, a row a kind (truth, offline, streamed; or truth, copy)."""
    kinds = [kind for kind in packed[0] if kind != "shape"]
    figure = Figure(figsize=(5 * len(packed), 2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), len(packed), squeeze=False)
    for column, example in enumerate(packed):
        for row, kind in enumerate(kinds):
            pixels = np.frombuffer(base64.b64decode(example[kind]), np.uint8).reshape(example["shape"])
            axes[row][column].imshow(pixels.T, origin="lower", aspect="auto", vmin=0, vmax=255)
            axes[row][column].set_title(kind, fontsize=9)
            axes[row][column].tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
