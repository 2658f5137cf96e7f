"""Convolutions of `Signal`s: kernels as torch's, of any size, dilation and stride, and upsampling ones."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cv2jax.nn.layers import partitioned
from cv2jax.nn.signal import Extent, Signal

AXES = ("conv", "embed", None)  # split by inputs alone: a vocoder is small, and its width is halved at each stage


class SignalConv(nn.Module):
    """A 1-D convolution, kernel layout [k, in, out].

    Attributes:
      shape: (kernel size, input channels, output channels). dilation, stride: as in torch.
      left: how far output i · 1 reaches back from input i · stride; None: centred.
      extra: of the output Signal; None: of the input.
      origin: of the inputs, from which the bias counts: as if it were taken from them, also where they are padded with 0.
      init_scale: standard deviation of the initial kernel; None: uniform within 1/√fan-in, as torch's. bias_init: its bias.
      dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    dilation: int = 1
    stride: int = 1
    left: int | None = None
    extra: int | None = None
    origin: float = 0.0
    init_scale: float | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: str = "float32"

    def setup(self) -> None:
        bound = (self.shape[0] * self.shape[1]) ** -0.5
        plain = nn.initializers.uniform(2 * bound)
        centred: Any = lambda *args: plain(*args) - bound  # noqa: E731
        init = centred if self.init_scale is None else nn.initializers.normal(self.init_scale)
        self.kernel = self.param("kernel", partitioned(init, AXES), self.shape)
        self.bias = self.param("bias", partitioned(self.bias_init, ("norm",)), self.shape[-1:])

    def __call__(self, extent: Extent, signal: Signal) -> Signal:
        """Convolves; what lies outside the utterance is zero before and after."""
        return self.on_extended(extent, *self.extend(extent, signal))

    def extend(self, extent: Extent, signal: Signal) -> tuple[Float[Array, "B m D"], Signal]:
        """What `on_extended` reads."""
        span = (self.shape[0] - 1) * self.dilation + 1
        return extent.extend(signal, span, self.reach, stride=self.stride, extra=self.extra)

    @property
    def reach(self) -> int:
        """How many inputs before its own an output sees."""
        return (self.shape[0] - 1) // 2 * self.dilation if self.left is None else self.left

    def on_extended(self, extent: Extent, values: Float[Array, "B m D"], empty: Signal) -> Signal:
        """Convolves what `extend` returned, or a function of it that keeps zeros."""
        y = jax.lax.conv_general_dilated(
            values.astype(self.dtype),
            self.kernel.astype(self.dtype),
            (self.stride,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        bias = self.bias - self.origin * jnp.sum(self.kernel, axis=(0, 1)) if self.origin else self.bias
        return extent.mask(empty.holding(y + bias.astype(self.dtype)))


class SignalUpsampling(nn.Module):
    """A transposed 1-D convolution that gives `stride` elements for each, kernel layout [k, in, out].

    Computed as `stride` convolutions side by side, of the taps that each of the new elements sees: no product with the
    zeros between the inputs.

    Attributes:
      shape: (kernel size, input channels, output channels); size - stride is even and cut off in halves.
      unit: the parameter is the kernel times this. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    stride: int
    unit: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, extent: Extent, signal: Signal) -> Signal:
        """Upsamples; what lies outside the utterance is zero before and after."""
        size, num_in, num_out = self.shape
        init = partitioned(interpolating_init(self.stride, self.unit), AXES)
        kernel = self.param("kernel", init, self.shape) / self.unit
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), (num_out,))
        num_taps = -(-size // self.stride)
        padded = jnp.pad(kernel.astype(self.dtype), ((0, num_taps * self.stride - size), (0, 0), (0, 0)))
        phases = padded.reshape(num_taps, self.stride, num_in, num_out)[::-1].transpose(0, 2, 1, 3)
        values, empty = extent.extend(signal, num_taps, num_taps - 1, extra=1)
        blocks = jax.lax.conv_general_dilated(
            values.astype(self.dtype),
            phases.reshape(num_taps, num_in, self.stride * num_out),
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        delayed = empty.holding(signal.values)
        y = extent.upsampled(blocks, delayed, self.stride, (size - self.stride) // 2)
        return extent.mask(y.holding(y.values + bias.astype(self.dtype)))


def interpolating_init(stride: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """`scale` times a random matrix of variance 1 / fan-in for a kernel [k, in, out], spread over its taps as interpolation.

    Independent taps would stamp a pattern on each input element, and what is to be periodic in the output would be learnt
    as that: a buzz at the rate of the input.
    """

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        size, num_in, num_out = shape
        taps = jnp.minimum(jnp.arange(size) + 1, size - jnp.arange(size)).astype(dtype)
        total = jnp.zeros(stride, dtype).at[jnp.arange(size) % stride].add(taps)
        matrix = jax.random.normal(key, (num_in, num_out), dtype, out_sharding=out_sharding) * (scale * num_in**-0.5)
        return (taps / total[jnp.arange(size) % stride])[:, None, None] * matrix

    return init
