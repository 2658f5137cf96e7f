"""SpecAugment: random frequency and time masks on a padded batch of log-mel spectrograms."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from cv2jax.nn.masks import length_mask


def spec_augment(
    mel: Float[Array, "B M F"],
    num_frames: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    num_freq_masks: int = 2,
    max_freq_bins: int = 40,
    num_time_masks: int = 2,
    max_time_share: float = 0.12,
) -> Float[Array, "B M F"]:
    """Replaces random bands and spans by the row's mean over its valid frames (SenseVoice's recipe without time warp).

    Every row draws its own masks: widths uniform in 0..max_freq_bins bins and 0..floor(max_time_share · num_frames)
    frames, starts uniform such that a mask lies inside the bins and the *valid* frames. Padding is left as it was.
    The mean and not 0, because a Whisper log-mel is not centred: 0 is an audible level.
    """
    num_bins, size = mel.shape[1], mel.shape[2]
    freq_key, time_key = jax.random.split(key)
    bins = jnp.full_like(num_frames, num_bins)
    widest = jnp.full_like(num_frames, min(max_freq_bins, num_bins))
    spans = jnp.floor(num_frames * max_time_share).astype(num_frames.dtype)
    freq = _random_spans(freq_key, bins, widest, num_freq_masks, num_bins)
    time = _random_spans(time_key, num_frames, spans, num_time_masks, size)
    valid = length_mask(num_frames, size)[:, None, :]
    total = jnp.sum(jnp.where(valid, mel, 0), axis=(1, 2), keepdims=True)
    mean = total / jnp.maximum(num_frames * num_bins, 1)[:, None, None]
    return jnp.where((freq[:, :, None] | time[:, None, :]) & valid, mean, mel)


def _random_spans(
    key: Key[Array, ""], lengths: Int[Array, " B"], widest: Int[Array, " B"], num_spans: int, size: int
) -> Bool[Array, "B size"]:
    """True inside `num_spans` random spans a row, each at most `widest` long and inside the row's first `lengths`."""
    width_key, start_key = jax.random.split(key)
    shape = (lengths.shape[0], num_spans)
    widths = jax.random.randint(width_key, shape, 0, widest[:, None] + 1)
    starts = jax.random.randint(start_key, shape, 0, lengths[:, None] - widths + 1)
    positions = jnp.arange(size)
    inside = (positions >= starts[..., None]) & (positions < (starts + widths)[..., None])
    return jnp.any(inside, axis=1)
