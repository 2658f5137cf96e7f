"""How far synthesised speech lies from the recording it was made from: spectra, pitch, and judges where installed."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cv2jax.audio.f0 import fundamental_frequency
from cv2jax.audio.mel import MEL_FFT, MEL_HOP, MEL_RATE_HZ, mel_spectrogram
from cv2jax.audio.stft import LEAST_POWER, RESOLUTIONS, frame, hann_window, power_spectrum, reflect_pad
from cv2jax.config import UserError
from cv2jax.evaluation.perceptual import perceptual_scores

_GROSS = 0.2  # of the F0: what the literature calls a gross pitch error
NUM_PICTURES = 4
_LOWEST_DB, _HIGHEST_DB = -80.0, 20.0  # shown
_SUMS = (
    "voiced_frames",
    "squared_hz",
    "squared_cents",
    "gross_errors",
    "voicing_errors",
    "f0_frames",
)  # pooled over frames, not means

Pair = tuple[str, np.ndarray, np.ndarray]  # name, original [W], synthesised [W]


def magnitudes(waveform: Float[np.ndarray, " W"], num_points: int, hop: int, window: int) -> Float[np.ndarray, "F K"]:
    """STFT magnitudes `[F K]`, centred on the samples 0, hop, …, of a Hann window; K = num_points / 2 + 1."""
    padded = reflect_pad(waveform[None], np.array([len(waveform)]), window // 2)
    frames = frame(padded, window, hop, len(waveform) // hop + 1) * hann_window(window)
    return np.sqrt(np.maximum(power_spectrum(frames, num_points)[0], LEAST_POWER))


def spectral_distances(original: Float[np.ndarray, " W"], synthesised: Float[np.ndarray, " W"]) -> dict[str, float]:
    """Distances of the spectra of two 24 kHz waveforms of equal length.

    `stft_convergence` and `stft_log_magnitude` (natural log), means over three resolutions (Parallel WaveGAN, eq. 4 and 5),
    and `stft_distance`, their sum; `log_spectral_distance` in dB; `mel_l1` of the log-mel up to 12 kHz, NaN without a frame.
    """
    convergence, logs = [], []
    for resolution in RESOLUTIONS:
        one, other = (magnitudes(x, *resolution) for x in (original, synthesised))
        convergence.append(np.linalg.norm(one - other) / np.linalg.norm(one))
        logs.append(np.abs(np.log(one) - np.log(other)).mean())
    one, other = (20 * np.log10(magnitudes(x, 2048, MEL_HOP, MEL_FFT)) for x in (original, synthesised))
    mel, _ = mel_spectrogram(np.stack([original, synthesised]), fmax=None)
    return {
        "stft_distance": float(np.mean(convergence) + np.mean(logs)),
        "stft_convergence": float(np.mean(convergence)),
        "stft_log_magnitude": float(np.mean(logs)),
        "log_spectral_distance": float(np.sqrt(((one - other) ** 2).mean(axis=1)).mean()),
        "mel_l1": float(np.abs(mel[0] - mel[1]).mean()) if mel.shape[2] else float("nan"),
    }


def f0_sums(original: Float32[np.ndarray, " F"], synthesised: Float32[np.ndarray, " F"]) -> dict[str, float]:
    """Sums over frames of the F0 (Hz, 0 unvoiced) of two waveforms, by which utterances are pooled.

    `squared_hz`, `squared_cents` and `gross_errors` (over 20 % off: mostly octaves) over the `voiced_frames` that are voiced
    in both; `voicing_errors` of `f0_frames`.
    """
    both = (original > 0) & (synthesised > 0)
    one, other = original[both].astype(np.float64), synthesised[both].astype(np.float64)
    return {
        "voiced_frames": float(both.sum()),
        "squared_hz": float(((other - one) ** 2).sum()),
        "squared_cents": float(((1200 * np.log2(other / one)) ** 2).sum()),
        "gross_errors": float((np.abs(other - one) > _GROSS * one).sum()),
        "voicing_errors": float(((original > 0) != (synthesised > 0)).sum()),
        "f0_frames": float(len(original)),
    }


def _f0_metrics(sums: dict[str, float]) -> dict[str, float]:
    """RMSE and gross errors over what is voiced in both, share of frames voiced in one alone; left out without a frame."""
    found = {}
    if sums["voiced_frames"]:
        found["f0_rmse_hz"] = float(np.sqrt(sums["squared_hz"] / sums["voiced_frames"]))
        found["f0_rmse_cents"] = float(np.sqrt(sums["squared_cents"] / sums["voiced_frames"]))
        found["f0_gross_error"] = sums["gross_errors"] / sums["voiced_frames"]
    if sums["f0_frames"]:
        found["voicing_error"] = sums["voicing_errors"] / sums["f0_frames"]
    return found


class VocoderScore:
    """Sums over utterances. Arguments: method: the F0 tracker that judges both sides; perceptual: ask PESQ and STOI."""

    def __init__(self, *, method: str = "harvest", perceptual: bool = True) -> None:
        self._method, self._perceptual = method, perceptual
        self._found: list[dict[str, float]] = []
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._num_non_finite = self._num_without_f0 = 0
        self.pictures: list[Pair] = []

    def add(self, name: str, original: Float[np.ndarray, " W"], synthesised: Float[np.ndarray, " V"]) -> dict[str, Any]:
        """Judges one utterance of 24 kHz and returns its figures; those that it cannot have are left out.

        Lengths may differ by less than a mel frame, the longer is cut. `status` is "ok", "no_f0" where no frame is voiced
        in both, "non_finite" where the synthesised waveform has NaN or infinite samples: such a one is in no mean, and is
        counted. Raises UserError for lengths that differ by more and for an original that is not finite or empty.
        """
        if abs(len(original) - len(synthesised)) >= MEL_HOP or not min(len(original), len(synthesised)):
            raise UserError(
                f"{name}: {len(synthesised)} samples were synthesised from {len(original)};"
                f" less than {MEL_HOP} may be missing"
            )
        if not np.isfinite(original).all():
            raise UserError(f"{name}: the original holds NaN or infinite samples; write the file again")
        if not np.isfinite(synthesised).all():
            self._num_non_finite += 1
            return {"id": name, "status": "non_finite"}
        length = min(len(original), len(synthesised))
        one, other = (np.asarray(x[:length], np.float64) for x in (original, synthesised))
        found = spectral_distances(one, other)
        sums = f0_sums(*(fundamental_frequency(x, MEL_RATE_HZ, MEL_HOP, method=self._method) for x in (one, other)))
        for key, value in sums.items():
            self._sums[key] += value
        self._num_without_f0 += not sums["voiced_frames"]
        found |= perceptual_scores(one, other, MEL_RATE_HZ) if self._perceptual else {}
        found = {key: value for key, value in found.items() if np.isfinite(value)}
        self._found.append(found)
        if len(self.pictures) < NUM_PICTURES:
            self.pictures.append((name, one, other))
        status = "ok" if sums["voiced_frames"] else "no_f0"
        return {"id": name, "status": status, "seconds": length / MEL_RATE_HZ, **found, **_f0_metrics(sums)}

    def metrics(self) -> dict[str, float | int]:
        """Means over the utterances that have a figure; F0 over frames; how many were judged, were not finite, had no F0."""
        names = sorted({name for found in self._found for name in found})
        means = {name: float(np.mean([f[name] for f in self._found if name in f])) for name in names}
        counts = {"num_utterances": len(self._found), "num_non_finite": self._num_non_finite}
        counts |= {f"num_{name}": sum(name in f for f in self._found) for name in ("pesq", "stoi") if name in names}
        return means | _f0_metrics(self._sums) | counts | {"num_without_f0": self._num_without_f0}


def draw_pairs(pairs: Sequence[Pair]) -> bytes:
    """PNG: a column an utterance; the spectrogram of the original, that of the synthesised, both waveforms."""
    figure = Figure(figsize=(5 * len(pairs), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(pairs), squeeze=False)
    for column, (name, original, synthesised) in enumerate(pairs):
        for row, (kind, waveform) in enumerate((("original", original), ("synthesised", synthesised))):
            decibels = 20 * np.log10(magnitudes(np.nan_to_num(waveform), 1024, 120, 600))
            extent = (0, len(waveform) / MEL_RATE_HZ, 0, MEL_RATE_HZ / 2000)
            shown = {"origin": "lower", "aspect": "auto", "vmin": _LOWEST_DB, "vmax": _HIGHEST_DB, "extent": extent}
            axes[row][column].imshow(decibels.T, **shown)
            axes[row][column].set_title(f"{name}, {kind}", fontsize=9)
            axes[row][column].set_ylabel("kHz", fontsize=8)
        for kind, waveform, width in (("original", original, 0.8), ("synthesised", synthesised, 0.4)):
            seconds = np.arange(len(waveform)) / MEL_RATE_HZ
            axes[2][column].plot(seconds, waveform, linewidth=width, label=kind)
        axes[2][column].legend(fontsize=7, loc="upper right")
        axes[2][column].set_xlabel("s", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
