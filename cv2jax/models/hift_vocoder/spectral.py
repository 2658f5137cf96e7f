"""What the vocoder's training weighs without discriminators: distances of spectra."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cv2jax.audio.mel import mel_spectrogram
from cv2jax.audio.stft import LEAST_POWER, RESOLUTIONS, frame, hann_window, power_spectrum


def mel_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean |difference| of log-mel up to 12 kHz [B] (official `mel_spec_transform1`)."""
    spectra = [jnp.asarray(mel_spectrogram(wave, fmax=None)[0]) for wave in (made, real)]
    return jnp.mean(jnp.abs(spectra[0] - spectra[1]), axis=(1, 2))


def stft_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean |difference| of log-magnitudes over three resolutions [B] (Yamamoto et al. 2020, eq. 5)."""
    return sum((_log_distance(made, real, *r) for r in RESOLUTIONS), jnp.zeros(len(made))) / len(RESOLUTIONS)


def _log_distance(made: Array, real: Array, points: int, hop: int, window: int) -> Float[Array, " B"]:
    logs = [_log_magnitude(wave, points, hop, window) for wave in (made, real)]
    return jnp.mean(jnp.abs(logs[0] - logs[1]), axis=(1, 2))


def _log_magnitude(wave: Float[Array, "B W"], points: int, hop: int, window: int) -> Float[Array, "B F K"]:
    num_frames = max((wave.shape[1] - window) // hop + 1, 1)
    frames = frame(wave, window, hop, num_frames) * jnp.asarray(hann_window(window), wave.dtype)
    return 0.5 * jnp.log(jnp.maximum(jnp.asarray(power_spectrum(frames, points)), LEAST_POWER))
