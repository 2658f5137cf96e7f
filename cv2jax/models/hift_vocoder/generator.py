"""The HiFT generator: mel and source → waveform (official `hifigan/generator.py`, spec/official.md 5.3)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cv2jax.models.hift_vocoder.config import LEAKY_SLOPE, MEL_UNIT, HiftVocoderConfig
from cv2jax.models.hift_vocoder.istft import istft, stft
from cv2jax.nn.layers import partitioned
from cv2jax.nn.signal import Extent, Signal, add
from cv2jax.nn.signal_conv import SignalConv, SignalUpsampling
from cv2jax.nn.trig import cos, sin, sin_squared

_INIT_SCALE = 0.01  # of the kernels in residual blocks, and of the last, as upstream's
_LAST_SLOPE = 0.01  # of the last activation: upstream forgets its 0.1 there (quirk Q20)
# Of what a fresh generator says: quiet, where 0 would be pulses of full scale.
_INITIAL_LOG_MAGNITUDE = -3.0


class Snake(nn.Module):
    """x + sin²(αx) / α with a learnt α a channel (Ziyin et al. 2020)."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B n D"]) -> Float[Array, "B n D"]:
        """Maps [B n D]; 0 stays 0."""
        alpha = self.param("alpha", partitioned(nn.initializers.ones, ("norm",)), (self.width,))
        slope = alpha.astype(x.dtype)
        return x + sin_squared(slope * x) / (slope + 1e-9)


class ResidualBlock(nn.Module):
    """For each dilation: Snake, dilated convolution, Snake, convolution, added to what came in."""

    width: int
    kernel_size: int
    dilations: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, extent: Extent, x: Signal) -> Signal:
        """Maps [B n D]."""
        shape = (self.kernel_size, self.width, self.width)
        options = {"init_scale": _INIT_SCALE, "dtype": self.dtype}
        for i, dilation in enumerate(self.dilations):
            conv = SignalConv(shape, dilation=dilation, name=f"dilated_{i}", **options)
            seen, empty = conv.extend(extent, x)
            y = conv.on_extended(extent, Snake(self.width, name=f"snake_dilated_{i}")(seen), empty)
            y = y.holding(Snake(self.width, name=f"snake_plain_{i}")(y.values))
            y = SignalConv(shape, name=f"plain_{i}", **options)(extent, y)
            first = conv.reach + empty.delay - y.delay
            x = y.holding(y.values + seen[:, first : first + y.values.shape[1]].astype(y.values.dtype))
        return x


class HiftGenerator(nn.Module):
    """Upsampling of the mel, the source's spectrum added at each stage; magnitudes and phases of short frames at the end."""

    config: HiftVocoderConfig

    @nn.compact
    def __call__(self, extent: Extent, mel: Signal, source: Signal) -> Signal:
        """mel [B F M], source [B 480 F 1] → waveform [B 480 F 1], fp32."""
        c = self.config
        num_bins = c.istft_points // 2 + 1
        spectrum = stft(extent, source, c.istft_points)
        conv_in = SignalConv((7, c.num_mels, c.width), origin=c.mel_origin / MEL_UNIT, dtype=c.dtype, name="conv_in")
        x = conv_in(extent, mel.holding(mel.values / MEL_UNIT))
        for i in range(len(c.upsample_rates)):
            x = self._stage(extent, x, spectrum, i)
        x = x.holding(nn.leaky_relu(x.values, _LAST_SLOPE))
        quiet = lambda key, shape, dtype=jnp.float32: jnp.where(  # noqa: E731
            jnp.arange(shape[0]) < num_bins, _INITIAL_LOG_MAGNITUDE, 0.0
        ).astype(dtype)
        # In fp32: a bf16 of a log-magnitude of -7 is 1.6 % off as a magnitude.
        shape = (7, c.width >> len(c.upsample_rates), 2 * num_bins)
        x = SignalConv(shape, init_scale=_INIT_SCALE, bias_init=quiet, name="conv_out")(extent, x)
        wide = x.values.astype(jnp.float32)
        # e^min and not min(e^): the gradient of what is clipped is zero, where infinity's would be NaN.
        magnitude = jnp.exp(jnp.minimum(wide[..., :num_bins], jnp.log(c.max_magnitude)))
        phase = sin(wide[..., num_bins:])  # sic (quirk Q20)
        parts = jnp.concatenate([magnitude * cos(phase), magnitude * sin(phase)], axis=-1)
        wave = istft(extent, x.holding(parts), c.istft_points)
        return wave.holding(jnp.clip(wave.values, -c.max_amplitude, c.max_amplitude))

    def _stage(self, extent: Extent, x: Signal, spectrum: Signal, i: int) -> Signal:
        c = self.config
        width = c.width >> (i + 1)
        last = i == len(c.upsample_rates) - 1
        x = x.holding(nn.leaky_relu(x.values, LEAKY_SLOPE))
        shape = (c.upsample_kernels[i], 2 * width, width)
        options = {"unit": c.upsampling_unit, "dtype": c.dtype}
        x = SignalUpsampling(shape, c.upsample_rates[i], name=f"upsample_{i}", **options)(extent, x)
        if last:
            x = extent.reflect_start(x)
        stride = spectrum.rate // x.rate
        kernel = 2 * stride if stride > 1 else 1
        down = SignalConv(
            (kernel, c.istft_points + 2, width),
            stride=stride,
            left=stride // 2,
            extra=x.extra,
            dtype=c.dtype,
            name=f"source_down_{i}",
        )
        source = ResidualBlock(width, c.source_kernels[i], c.dilations, c.dtype, name=f"source_block_{i}")
        x = add(extent, x, source(extent, down(extent, spectrum)))
        blocks = [ResidualBlock(width, k, c.dilations, c.dtype, name=f"block_{i}_{k}") for k in c.block_kernels]
        total = blocks[0](extent, x)
        for block in blocks[1:]:
            total = add(extent, total, block(extent, x))
        return total.holding(total.values / len(blocks))
