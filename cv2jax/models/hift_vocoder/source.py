"""The harmonic source of the vocoder: sines of the fundamental and its harmonics, and noise (spec/official.md 5.2).

The maths is that of SineGen2: the phase is summed over frames and lies on a line between their centres. Two things differ.
The sum is exact, so that an hour of speech has the phase of the first second: upstream's fp32 is off by radians. And noise is
a function of (key of the request, sample), never of the chunk.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.nn.layers import partitioned
from cv2jax.nn.signal import Chunk, Extent, Signal
from cv2jax.nn.trig import sin_turns

_TWO_32 = 2.0**32
_INITIAL_SUM = 9.0  # of the projection's weights: with sines of 0.1 nearly full scale


def split_hertz(f0: Float[Array, "..."], modulus: int) -> tuple[Int[Array, "..."], UInt32[Array, "..."]]:
    """f0 in Hz as whole Hz modulo `modulus` and 2⁻³² Hz: exact for every fp32 of 2⁻⁸ Hz and above."""
    whole = jnp.floor(f0)
    fraction = ((f0 - whole) * _TWO_32).astype(jnp.uint32)
    return jnp.mod(whole, modulus).astype(jnp.int32), fraction


def sum_hertz(
    whole: Int[Array, "B n"], fraction: UInt32[Array, "B n"], modulus: int
) -> tuple[Int[Array, "B n"], UInt32[Array, "B n"]]:
    """Running sums along the frames, in the same two words, modulo `modulus` Hz: integers, which never round."""

    def plus(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        fraction = a[1] + b[1]
        carry = (fraction < a[1]).astype(jnp.int32)
        return (a[0] + b[0] + carry) % modulus, fraction

    return jax.lax.associative_scan(plus, (whole, fraction), axis=1)


def cycles(
    whole: Int[Array, "B n"], fraction: UInt32[Array, "B n"], modulus: int, num_sines: int
) -> Float[Array, "B n H"]:
    """The phase in cycles, in [0, 1), of the harmonics 1 … H after that sum of Hz at `modulus` frames a second."""
    h = jnp.arange(1, num_sines + 1, dtype=jnp.uint32)
    low = (fraction & 0xFFFF)[..., None] * h
    high = (fraction >> 16)[..., None] * h + (low >> 16)
    hertz = (whole[..., None] * h.astype(jnp.int32) + (high >> 16).astype(jnp.int32)) % modulus
    rest = ((high & 0xFFFF) << 16 | (low & 0xFFFF)).astype(jnp.float32) / _TWO_32
    return (hertz.astype(jnp.float32) + rest) / modulus


class HarmonicSource(nn.Module):
    """F0 → source waveform; the sines are mixed by one learnt projection."""

    config: HiftVocoderConfig

    @nn.compact
    def __call__(
        self, extent: Extent, f0: Signal, keys: Key[Array, " B"], noise: Float[Array, "B W H"] | None = None
    ) -> Signal:
        """f0 [B F 1] in Hz → source [B 480 F 1] in [-1, 1]; `noise`: normal draws to use in place of the keys' (whole only).

        Upstream adds noise to each sine before the projection. The sum of independent normal draws is one draw, as large as
        the projection's weights: that is what the keys draw.
        """
        c, half = self.config, self.config.mel_hop // 2
        num_sines = c.num_harmonics + 1
        # All harmonics at first, in phase: a pulse a period, which no filter of a mel makes by itself.
        pulses = nn.initializers.constant(_INITIAL_SUM / num_sines)
        kernel = self.param("kernel", partitioned(pulses, (None, None)), (num_sines, 1))
        bias = self.param("bias", partitioned(nn.initializers.zeros, (None,)), (1,))
        sines, voiced, segments = sine_segments(c, extent, f0)
        if noise is None:
            mixed = jnp.linalg.norm(kernel) * draw_noise(keys, extent.positions(segments), c.mel_hop)
        else:
            projected = jnp.pad((noise @ kernel)[..., 0], ((0, 0), (half, half)))
            mixed = projected.reshape(*segments.values.shape[:2], c.mel_hop)
        tone = jnp.where(voiced, c.sine_amplitude * (sines @ kernel)[..., 0], 0)
        rows = jnp.tanh(tone + jnp.where(voiced, c.noise_amplitude, c.sine_amplitude / 3) * mixed + bias)
        samples = rows.reshape(rows.shape[0], -1, 1)
        if isinstance(extent, Chunk):
            return Signal(samples, c.mel_hop, c.mel_hop * segments.delay + half)
        return Signal(samples[:, half:-half], c.mel_hop)


def sine_segments(
    config: HiftVocoderConfig, extent: Extent, f0: Signal
) -> tuple[Float[Array, "B n W H"], Bool[Array, "B n W"], Signal]:
    """(sines, whether voiced, their Signal of segments): segment i lies between the centres of the frames i - 1 and i.

    A frame's phase is 2π · h · (the sum of f0 up to it) / frame rate. The first and the last half frame keep the phase of
    the frame that they belong to (align_corners=False).
    """
    c = config
    modulus, hop = c.frame_rate_hz, c.mel_hop
    num_sines = c.num_harmonics + 1
    pairs, segments = extent.extend(f0, 2, 1, extra=1)
    before, here = pairs[:, :-1, 0], pairs[:, 1:, 0]
    segments = segments.holding(here[..., None])
    # The sum up to the frame before a segment, exactly; carried from chunk to chunk.
    rows = here.shape[0]
    start = extent.carry((jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.uint32)))
    parts = (jnp.concatenate([s[:, None], p], axis=1) for s, p in zip(start, split_hertz(here, modulus), strict=True))
    first, second = parts
    whole, fraction = sum_hertz(first, second, modulus)
    extent.keep((whole, fraction), segments)
    base = cycles(whole[:, :-1], fraction[:, :-1], modulus, num_sines)
    # A harmonic beyond the sampling rate turns by whole cycles a sample less, as upstream's.
    h = jnp.arange(1, num_sines + 1, dtype=jnp.float32)
    turn = jnp.mod(here[..., None] * h, c.rate_hz) / modulus
    is_first = extent.positions(segments) == 0
    weight = (jnp.arange(hop, dtype=jnp.float32) + 0.5) / hop
    weights = jnp.where(is_first[..., None], 1.0, weight)
    phase = base[:, :, None] + weights[..., None] * turn[:, :, None]
    is_later = jnp.arange(hop) >= hop // 2
    voiced = jnp.where(is_later, here[..., None], before[..., None]) > c.voiced_above_hz
    return sin_turns(phase), voiced, segments


def draw_noise(keys: Key[Array, " B"], segments: Int[Array, "B_or_1 n"], hop: int) -> Float[Array, "B n W"]:
    """Standard normal draws of each row's key and the number of each segment of `hop` samples."""
    places = jnp.broadcast_to(segments, (keys.shape[0], segments.shape[1]))
    draw = lambda key, place: jax.random.normal(jax.random.fold_in(key, place), (hop,))  # noqa: E731
    return jax.vmap(jax.vmap(draw, (None, 0)))(keys, places)
