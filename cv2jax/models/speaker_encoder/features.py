"""From stored audio to what the speaker encoder reads, on the device: crops, disturbances, fbank."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16, Key

from cv2jax.audio.fbank import FBANK_RATE_HZ, kaldi_fbank
from cv2jax.audio.resample import resample, resampled_length
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import MIN_FRAMES
from cv2jax.parallel.sharding import constrain

SILENT_RMS = 10 ** (-70 / 20)  # as `audio.io.check_audio`


def speaker_features(
    waveform: Int16[Array, "B W"], num_samples: Int[Array, " B"], rate_hz: int
) -> tuple[Float[Array, "B F M"], Int[Array, " B"]]:
    """(fbank less its mean [B F 80] at 100 Hz, num_frames [B]) of int16 audio at `rate_hz`; silent and short rows have 0."""
    scaled = constrain(waveform.astype(jnp.float32) / 32768, "batch", "length")
    scaled = resample(scaled, rate_hz, FBANK_RATE_HZ)
    return _fbank(scaled, resampled_length(num_samples, rate_hz, FBANK_RATE_HZ))


def training_features(
    config: SpeakerEncoderConfig,
    key: Key[Array, ""],
    waveform: Int16[Array, "B W"],
    num_samples: Int[Array, " B"],
    rate_hz: int,
) -> tuple[Float[Array, "B F M"], Int[Array, " B"], Int[Array, " B"]]:
    """(fbank, num_frames, index of the speed) of a random crop of each row, played at a random speed, disturbed.

    A row shorter than the crop is taken whole. Whether a row is silent is judged before any noise.
    """
    crop_key, speed_key, gain_key, noise_key = jax.random.split(key, 4)
    speeds, size = config.speeds, math.ceil(config.crop_seconds * rate_hz)
    longest = min(math.ceil(size * max(speeds)), waveform.shape[1])
    cut, num_samples = random_crop(crop_key, waveform, num_samples, longest)
    scaled = constrain(cut.astype(jnp.float32) / 32768, "batch", "length")
    chosen = jax.random.randint(speed_key, num_samples.shape, 0, len(speeds))
    audio, num_samples = _at_speeds(scaled, num_samples, chosen, speeds, size, rate_hz)
    is_silent = _rms(audio, num_samples) < SILENT_RMS
    audio = _disturb(config, gain_key, noise_key, audio, num_samples)
    features, num_frames = _fbank(audio, jnp.where(is_silent, 0, num_samples))
    return features, num_frames, chosen


def random_crop(
    key: Key[Array, ""], waveform: Int16[Array, "B W"], num_samples: Int[Array, " B"], size: int
) -> tuple[Int16[Array, "B V"], Int[Array, " B"]]:
    """`size` ≤ W samples of each row from a random place inside it, and how many of them there are."""
    room = jnp.maximum(num_samples - size, 0)
    starts = jax.random.randint(key, room.shape, 0, room + 1)
    cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (size,)))(waveform, starts)
    return cut, jnp.minimum(num_samples, size)


def _at_speeds(
    audio: Float[Array, "B W"],
    num_samples: Int[Array, " B"],
    chosen: Int[Array, " B"],
    speeds: tuple[float, ...],
    size: int,
    rate_hz: int,
) -> tuple[Float[Array, "B V"], Int[Array, " B"]]:
    """Up to `size` samples' time of each row at 16 kHz, at the speed that it chose; played faster, pitch and all rise."""
    room = resampled_length(size, rate_hz, FBANK_RATE_HZ)
    sounds, counts = [], []
    for speed in speeds:
        rate = round(rate_hz * speed)
        part = audio[:, : math.ceil(size * speed)]
        sound = resample(part, rate, FBANK_RATE_HZ)[:, :room]
        sounds.append(jnp.pad(sound, ((0, 0), (0, room - sound.shape[1]))))
        lengths = resampled_length(jnp.minimum(num_samples, part.shape[1]), rate, FBANK_RATE_HZ)
        counts.append(jnp.minimum(lengths, room))
    index = chosen[None]
    taken = jnp.take_along_axis(jnp.stack(sounds), index[..., None], axis=0)[0]
    return taken, jnp.take_along_axis(jnp.stack(counts), index, axis=0)[0]


def _disturb(
    config: SpeakerEncoderConfig,
    gain_key: Key[Array, ""],
    noise_key: Key[Array, ""],
    audio: Float[Array, "B W"],
    num_samples: Int[Array, " B"],
) -> Float[Array, "B W"]:
    rows = audio.shape[:1]
    if config.noise_share:
        draw_key, share_key, snr_key = jax.random.split(noise_key, 3)
        snr = jax.random.uniform(snr_key, rows, minval=config.min_snr_db, maxval=config.max_snr_db)
        level = _rms(audio, num_samples) * 10 ** (-snr / 20)
        level = jnp.where(jax.random.uniform(share_key, rows) < config.noise_share, level, 0)
        audio = audio + level[:, None] * jax.random.normal(draw_key, audio.shape)
    if config.max_gain_db:
        gain = jax.random.uniform(gain_key, rows, minval=-config.max_gain_db, maxval=config.max_gain_db)
        audio = audio * 10 ** (gain / 20)[:, None]
    return audio


def _fbank(audio: Float[Array, "B W"], num_samples: Int[Array, " B"]) -> tuple[Float[Array, "B F M"], Int[Array, " B"]]:
    num_samples = jnp.where(_rms(audio, num_samples) < SILENT_RMS, 0, num_samples)
    features, num_frames = map(jnp.asarray, kaldi_fbank(audio, num_samples, subtract_mean=True))
    return constrain(features, "batch", "length", None), jnp.where(num_frames < MIN_FRAMES, 0, num_frames)


def _rms(audio: Float[Array, "B W"], num_samples: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.sqrt(
        jnp.sum(jnp.square(jnp.where(_valid(audio, num_samples), audio, 0)), 1) / jnp.maximum(num_samples, 1)
    )


def _valid(audio: Float[Array, "B W"], num_samples: Int[Array, " B"]) -> Bool[Array, "B W"]:
    return jnp.arange(audio.shape[1])[None] < num_samples[:, None]
