"""What the vocoder's training weighs without discriminators: distances of spectra."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cv2jax.audio.mel import mel_spectrogram
from cv2jax.audio.stft import frame, hann_window, power_spectrum

# Points, hop, window, in samples (Yamamoto et al. 2020, table 1).
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_LEAST_POWER = 1e-7


def mel_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean |difference| of log-mel up to 12 kHz [B] (official `mel_spec_transform1`)."""
    spectra = [jnp.asarray(mel_spectrogram(wave, fmax=None)[0]) for wave in (made, real)]
    return jnp.mean(jnp.abs(spectra[0] - spectra[1]), axis=(1, 2))


def stft_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean |difference| of log-magnitudes over three resolutions [B] (Yamamoto et al. 2020, eq. 5)."""
    return sum((_log_distance(made, real, *r) for r in RESOLUTIONS), jnp.zeros(len(made))) / len(RESOLUTIONS)


def log_spectral_distance(
    made: Float[Array, "B W"], real: Float[Array, "B W"], num_samples: Array | None = None
) -> Float[Array, " B"]:
    """Root mean square over bins, mean over frames, of the difference of log-magnitudes, dB [B]; frames of 2,048 every 480."""
    points, hop = 2048, 480
    logs = [_log_magnitude(wave, points, hop, points) * (20 / jnp.log(10.0)) for wave in (made, real)]
    by_frame = jnp.sqrt(jnp.mean(jnp.square(logs[0] - logs[1]), axis=-1))
    count = by_frame.shape[1] if num_samples is None else jnp.maximum((num_samples - points) // hop + 1, 1)
    keep = jnp.arange(by_frame.shape[1])[None] < jnp.reshape(jnp.asarray(count), (-1, 1))
    return jnp.sum(jnp.where(keep, by_frame, 0), axis=1) / jnp.maximum(jnp.sum(keep, axis=1), 1)


def _log_distance(made: Array, real: Array, points: int, hop: int, window: int) -> Float[Array, " B"]:
    logs = [_log_magnitude(wave, points, hop, window) for wave in (made, real)]
    return jnp.mean(jnp.abs(logs[0] - logs[1]), axis=(1, 2))


def _log_magnitude(wave: Float[Array, "B W"], points: int, hop: int, window: int) -> Float[Array, "B F K"]:
    num_frames = max((wave.shape[1] - window) // hop + 1, 1)
    frames = frame(wave, window, hop, num_frames) * jnp.asarray(hann_window(window), wave.dtype)
    return 0.5 * jnp.log(jnp.maximum(jnp.asarray(power_spectrum(frames, points)), _LEAST_POWER))
