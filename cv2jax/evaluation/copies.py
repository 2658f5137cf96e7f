"""Held-out metrics of a vocoder in training: how far its copies of speech are from the speech, by spectrum and by F0."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cv2jax.audio.mel import MEL_HOP, mel_spectrogram
from cv2jax.evaluation.flow import pack_spectrograms
from cv2jax.evaluation.vocoder import spectral_distances

NUM_PICTURES = 2


class CopyScore:
    """Sums over batches. Argument: above how many Hz a frame counts as voiced."""

    def __init__(self, voiced_above_hz: float) -> None:
        self._voiced_above = voiced_above_hz
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._num_non_finite = 0
        self._pictures: list[dict[str, Any]] = []

    def _count(self, name: str, values: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
        self._counts[name] = self._counts.get(name, 0) + int(np.size(values))

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """One batch: `truth` and `copy`, waveforms [B W] of 24 kHz; predicted `f0` and `target_f0` [B F] in Hz; `num_frames`
        [B], 0 for a row that is none. A copy that is not finite is counted, and in no mean."""
        for row, count in enumerate(batch["num_frames"].tolist()):
            if not count:
                continue
            truth, copy = (batch[kind][row, : count * MEL_HOP].astype(np.float64) for kind in ("truth", "copy"))
            if not np.isfinite(copy).all():
                self._num_non_finite += 1
                continue
            for name, value in spectral_distances(truth, copy).items():
                self._count(name, value)
            f0, target = batch["f0"][row, :count], batch["target_f0"][row, :count]
            voiced = (f0 > self._voiced_above, target > self._voiced_above)
            self._count("voicing_error", (voiced[0] != voiced[1]).astype(np.float64))
            self._count("f0_squared", np.square(f0 - target)[voiced[0] & voiced[1]])
            if len(self._pictures) < NUM_PICTURES:
                mel, _ = mel_spectrogram(np.stack([truth, copy]), fmax=None)
                self._pictures.append(pack_spectrograms({"truth": np.asarray(mel[0].T), "copy": np.asarray(mel[1].T)}))

    def metrics(self) -> dict[str, Any]:
        """Means of `evaluation.vocoder.spectral_distances` over utterances, `f0_rmse_hz` of the predicted F0 where both are
        voiced, `voicing_error` as a share of frames, how many copies were not finite, and `spectrograms`."""
        means = {name: self._sums[name] / max(self._counts[name], 1) for name in sorted(self._sums)}
        squared = means.pop("f0_squared", 0.0)
        if self._counts.get("f0_squared"):
            means["f0_rmse_hz"] = squared**0.5
        return {**means, "num_non_finite": self._num_non_finite, "spectrograms": self._pictures}
