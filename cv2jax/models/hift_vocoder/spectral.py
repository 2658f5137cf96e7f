"""What the vocoder's training weighs without discriminators: distances of spectra."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cv2jax.audio.mel import mel_spectrogram
from cv2jax.audio.stft import LEAST_POWER, RESOLUTIONS, frame, hann_window, power_spectrum

QUIET = 0.01  # root of the mean power of an STFT bin: about that of speech at -60 dB
TINY = 1e-12  # below it the root has no slope


def mel_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean |difference| of log-mel up to 12 kHz [B] (official `mel_spec_transform1`)."""
    spectra = [jnp.asarray(mel_spectrogram(wave, fmax=None)[0]) for wave in (made, real)]
    return jnp.mean(jnp.abs(spectra[0] - spectra[1]), axis=(1, 2))


def stft_distance(made: Float[Array, "B W"], real: Float[Array, "B W"]) -> Float[Array, " B"]:
    """Mean over three resolutions of spectral convergence plus |difference| of log-magnitudes [B] (Yamamoto 2020, eq. 3).

    The logarithm hears every bin alike; without the convergence, loud low harmonics come out too quiet. A window quieter than
    `QUIET` is measured against that: what is wrong there is not heard.
    """
    return sum((_distance(made, real, *r) for r in RESOLUTIONS), jnp.zeros(len(made))) / len(RESOLUTIONS)


def _distance(made: Array, real: Array, points: int, hop: int, window: int) -> Float[Array, " B"]:
    ours, theirs = (_magnitude(wave, points, hop, window) for wave in (made, real))
    error, power = (jnp.mean(x**2, axis=(1, 2)) for x in (ours - theirs, theirs))
    convergence = (jnp.sqrt(error + TINY) - TINY**0.5) / jnp.sqrt(jnp.maximum(power, QUIET**2))
    return convergence + jnp.mean(jnp.abs(jnp.log(ours) - jnp.log(theirs)), axis=(1, 2))


def _magnitude(wave: Float[Array, "B W"], points: int, hop: int, window: int) -> Float[Array, "B F K"]:
    num_frames = max((wave.shape[1] - window) // hop + 1, 1)
    frames = frame(wave, window, hop, num_frames) * jnp.asarray(hann_window(window), wave.dtype)
    return jnp.sqrt(jnp.maximum(jnp.asarray(power_spectrum(frames, points)), LEAST_POWER))
