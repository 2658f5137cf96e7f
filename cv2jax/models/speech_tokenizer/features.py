"""From stored audio to what the speech tokenizer reads, on the device: pure functions inside the compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int16

from cv2jax.audio.mel import WHISPER_RATE_HZ, log_mel_whisper
from cv2jax.audio.resample import resample, resampled_length
from cv2jax.parallel.sharding import constrain


def speech_features(
    waveform: Int16[Array, "B W"], num_samples: Int[Array, " B"], rate_hz: int
) -> tuple[Float[Array, "B V"], Int[Array, " B"], Float[Array, "B M F"], Int[Array, " B"]]:
    """(waveform 16 kHz [B V] in [-1, 1], num_samples [B], log-mel [B 128 F], num_frames [B]) of int16 audio at `rate_hz`."""
    scaled = waveform.astype(jnp.float32) / 32768
    scaled = constrain(resample(scaled, rate_hz, WHISPER_RATE_HZ), "batch", "length")
    num_samples = resampled_length(num_samples, rate_hz, WHISPER_RATE_HZ)
    mel, num_frames = map(jnp.asarray, log_mel_whisper(scaled, num_samples))
    return scaled, num_samples, constrain(mel, "batch", None, "length"), num_frames
