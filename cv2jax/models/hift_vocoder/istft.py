"""Short Fourier transforms of 16 points as small products: no exchange between devices, and streamed like a convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cv2jax.audio.stft import hann_window
from cv2jax.nn.signal import Extent, Signal


@functools.cache
def _forward(points: int) -> Float[np.ndarray, "N K2"]:
    """[N, 2 K]: windowed cosines, then sines: real and imaginary parts of K = N/2 + 1 frequencies."""
    angle = 2 * np.pi / points * (np.arange(points)[:, None] * np.arange(points // 2 + 1) % points)
    return (hann_window(points)[:, None] * np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)).astype(np.float32)


@functools.cache
def _backward(points: int) -> Float[np.ndarray, "K2 N"]:
    """[2 K, N]: what each real and imaginary part adds to a windowed frame; the sines of 0 Hz and of Nyquist are nothing."""
    bins = np.arange(points // 2 + 1)
    angle = 2 * np.pi / points * (bins[:, None] * np.arange(points) % points)
    twice = np.where((bins == 0) | (bins == points // 2), 1.0, 2.0)[:, None] / points
    sines = np.where((bins == 0) | (bins == points // 2), 0.0, -2.0 / points)[:, None] * np.sin(angle)
    return (hann_window(points) * np.concatenate([twice * np.cos(angle), sines])).astype(np.float32)


def stft(extent: Extent, source: Signal, points: int) -> Signal:
    """Samples [B W 1] → real and imaginary parts [B W/hop + 1, 2 K] of centred Hann frames, reflected at both ends.

    `torch.stft` of `points` and a hop of a quarter of that (spec/official.md 5.3).
    """
    hop, half = points // 4, points // 2
    # A hop more to the left than a frame has: the last frames mirror that far.
    values, empty = extent.extend(source, points + hop, half + hop, stride=hop, extra=1)
    samples = _reflected(extent, values[..., 0], source, empty, half + hop)
    blocks = samples.reshape(samples.shape[0], -1, hop)
    num = blocks.shape[1] - 4
    frames = jnp.concatenate([blocks[:, 1 + i : 1 + i + num] for i in range(4)], axis=-1)
    spectrum = jnp.matmul(frames.astype(jnp.float32), _forward(points), precision="highest")
    return extent.mask(empty.holding(spectrum))


def _reflected(
    extent: Extent, samples: Float[Array, "B m"], source: Signal, empty: Signal, left: int
) -> Float[Array, "B m"]:
    """The extended samples with the half frames outside each utterance mirrored at its first and its last sample.

    Only these are moved: an index for each sample of the wave would crawl on a TPU.
    """
    hop = source.rate // empty.rate
    half = left - hop
    first = extent.positions(empty.holding(samples[:, :1, None]))[:, 0] * hop - left
    first = jnp.broadcast_to(first, samples.shape[:1])
    end = extent.last(source) + 1
    steps = jnp.arange(half, dtype=jnp.int32)

    def mirror(row: Array, first: Array, end: Array) -> Array:
        padded = jnp.pad(row, (half, half))  # so that a half frame that only begins in the row has a place too
        for start, places in ((-half, half - steps), (end, end - 2 - steps)):
            mirrored = row[jnp.clip(places - first, 0, row.shape[0] - 1)]
            at = jnp.clip(start - first + half, 0, row.shape[0] + half)
            old = jax.lax.dynamic_slice_in_dim(padded, at, half)
            new = jnp.where(at == start - first + half, mirrored, old)
            padded = jax.lax.dynamic_update_slice_in_dim(padded, new, at, 0)
        return padded[half:-half]

    return jax.vmap(mirror)(samples, first, end)


def istft(extent: Extent, spectrum: Signal, points: int) -> Signal:
    """Real and imaginary parts [B W/hop + 1, 2 K] → samples [B W 1]: `torch.istft`, overlap-add by squared windows."""
    hop = points // 4
    frames = jnp.matmul(spectrum.values.astype(jnp.float32), _backward(points), precision="highest")
    squares = jnp.broadcast_to(jnp.asarray(hann_window(points) ** 2, jnp.float32), frames.shape)
    both = extent.mask(spectrum.holding(jnp.concatenate([frames, squares], axis=-1)))
    values, empty = extent.extend(both, 4, 1, extra=0)
    num = values.shape[1] - 3
    parts = values.reshape(*values.shape[:2], 2, 4, hop)
    total = sum((parts[:, i : i + num, :, 3 - i] for i in range(1, 4)), parts[:, :num, :, 3])
    samples = total[:, :, 0] / jnp.maximum(total[:, :, 1], 1e-6)
    return Signal(samples.reshape(samples.shape[0], -1, 1), empty.rate * hop, empty.delay * hop)
