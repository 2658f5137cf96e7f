"""From stored audio and speech tokens to what the flow is trained on, on the device: pure functions inside the step."""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int16, UInt32

from cv2jax.audio.mel import MEL_RATE_HZ, mel_spectrogram
from cv2jax.audio.resample import resample, resampled_length
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN
from cv2jax.parallel.sharding import constrain


def mel_features(
    waveform: Int16[Array, "B W"],
    num_samples: Int[Array, " B"],
    num_speech_tokens: Int[Array, " B"],
    rate_hz: int,
    num_slots: int,
) -> tuple[Float[Array, "B F M"], Int[Array, " B"]]:
    """(log-mel at 50 Hz of F = 2·`num_slots` frames, tokens that have both of their frames) of int16 audio at `rate_hz`.

    The tokens of a front end that pads its audio may reach behind the last whole frame, or stop before it: both are cut to
    the shorter one (quirk Q14; upstream fails there).
    """
    scaled = waveform.astype(jnp.float32) / 32768
    scaled = constrain(resample(scaled, rate_hz, MEL_RATE_HZ), "batch", "length")
    mel, num_frames = map(jnp.asarray, mel_spectrogram(scaled, resampled_length(num_samples, rate_hz, MEL_RATE_HZ)))
    size = FRAMES_PER_TOKEN * num_slots
    mel = jnp.pad(mel, ((0, 0), (0, 0), (0, max(size - mel.shape[2], 0))))[:, :, :size]
    num_tokens = jnp.minimum(num_speech_tokens, num_frames // FRAMES_PER_TOKEN)
    return constrain(jnp.swapaxes(mel, 1, 2), "batch", "length", None), num_tokens


def speaker_number(name: str) -> int:
    """32 bits of a speaker's name, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little")


def stand_in_embedding(numbers: UInt32[Array, " B"], size: int) -> Float[Array, "B E"]:
    """A fixed random unit vector for each `speaker_number`, until a speaker encoder is trained."""
    draw = lambda number: jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (size,))  # noqa: E731
    vectors = jax.vmap(draw)(numbers)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
