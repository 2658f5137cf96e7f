"""What the vocoder's training sees of a batch: windows of utterances with their mel and F0, cut on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int16, Key

from cv2jax.audio.mel import MEL_HOP, MEL_MARGIN, mel_with_margins
from cv2jax.audio.stft import reflect_pad, trim_rows
from cv2jax.parallel.sharding import constrain

Windows = dict[str, jax.Array]


def cut_windows(
    waveform: Int16[Array, "B W"],
    num_samples: Int[Array, " B"],
    f0: Float[Array, "B F"],
    key: Key[Array, ""],
    num_frames: int,
    per_utterance: int,
) -> Windows:
    """Windows of `num_frames` mel frames at random whole frames of utterances of 24 kHz, `per_utterance` of each.

    Returns `waveform` [B·n, 480·num_frames] in [-1, 1], `mel` [B·n, num_frames, M] of the whole utterance (not of the
    window, which has no past), `f0` [B·n, num_frames] in Hz. An utterance that is shorter is followed by silence.
    """
    size = MEL_HOP * num_frames
    scaled, counts = map(jnp.asarray, trim_rows(waveform.astype(jnp.float32) / 32768, num_samples))
    padded = jnp.pad(jnp.asarray(reflect_pad(scaled, counts, MEL_MARGIN)), ((0, 0), (0, size)))
    f0 = jnp.pad(f0, ((0, 0), (0, num_frames)))
    last = jnp.maximum(counts // MEL_HOP - num_frames, 0)
    draws = jax.random.uniform(key, (waveform.shape[0], per_utterance))
    starts = jnp.minimum((draws * (last + 1)[:, None]).astype(jnp.int32), last[:, None])

    def cut(rows: Array, starts: Array, size: int) -> Array:
        one = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size)  # noqa: E731
        found = jax.vmap(jax.vmap(one, (None, 0)))(rows, starts)
        return constrain(found.reshape(-1, size), "batch", "length")

    audio = cut(padded, starts * MEL_HOP, size + 2 * MEL_MARGIN)
    mel = jnp.swapaxes(jnp.asarray(mel_with_margins(audio)), 1, 2)
    places = starts.reshape(-1, 1) * MEL_HOP + jnp.arange(size)
    heard = places < jnp.repeat(counts, per_utterance)[:, None]  # not what the mel mirrors behind the end
    return {
        "waveform": jnp.where(heard, audio[:, MEL_MARGIN:-MEL_MARGIN], 0),
        "mel": mel,
        "f0": cut(f0, starts, num_frames),
    }
