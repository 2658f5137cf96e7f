"""Convolutions over time: strided, causal with a step of its own, and the depth-wise FSMN memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.layers import Axes, contract, fan_in_init, partitioned


class Conv1d(nn.Module):
    """A 1-D convolution over time with symmetric zero padding, kernel layout [k, in, out].

    Attributes:
      shape: (kernel size, input channels, output channels). axes: their logical names.
      stride: step in frames. padding: zeros on either side. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    axes: Axes
    stride: int = 1
    padding: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B F D_in"]) -> Float[Array, "B L D_out"]:
        """Maps F frames to (F + 2·padding - k)//stride + 1."""
        kernel = self.param("kernel", partitioned(fan_in_init(2, 3), self.axes), self.shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), self.shape[-1:])
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride,),
            padding=[(self.padding, self.padding)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + bias.astype(self.dtype)


def strided_length(lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Length after a convolution of kernel 3, stride 2, padding 1: (L-1)//2 + 1, which is ceil(L/2) and keeps 0 at 0."""
    return (lengths - 1) // 2 + 1


def depthwise_conv(
    x: Float[Array, "B T *channels"], kernel: Float[Array, "k *channels"]
) -> Float[Array, "B T *channels"]:
    """Convolves every channel with its own kernel over time, length kept by zero padding; ValueError for an even kernel.

    A sum of k shifted products in fp32, which XLA fuses into one loop. A grouped `lax` convolution of 31 taps is 30 times
    slower on a CPU, and for a TPU it compiles four times longer and takes four times the memory with its gradient.
    """
    size, num_frames = kernel.shape[0], x.shape[1]
    if size % 2 == 0:
        raise ValueError(f"a same-length depth-wise convolution needs an odd kernel, got {size}")
    padded = jnp.pad(x, [(0, 0), (size // 2, size // 2)] + [(0, 0)] * (x.ndim - 2)).astype(jnp.float32)
    taps = kernel.astype(jnp.float32)
    total = padded[:, :num_frames] * taps[0]
    for i in range(1, size):
        total = total + padded[:, i : i + num_frames] * taps[i]
    return total.astype(x.dtype)


class FsmnMemory(nn.Module):
    """The FSMN memory of a SAN-M attention: a depth-wise convolution on the values plus the values (spec/frontends.md 1.2).

    Heads stay a separate axis so that tensor parallelism needs no exchange here.

    Attributes:
      num_heads: H. head_dim: C. kernel_size: odd taps over time. dtype: computation dtype.
    """

    num_heads: int
    head_dim: int
    kernel_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, v: Float[Array, "B T H C"], mask: Bool[Array, "B T"]) -> Float[Array, "B T H C"]:
        """Returns mask · (conv(mask · v) + mask · v)."""
        shape = (self.kernel_size, self.num_heads, self.head_dim)
        init = nn.initializers.normal(self.kernel_size**-0.5)
        kernel = self.param("kernel", partitioned(init, ("conv", "heads", "head_dim")), shape)
        keep = mask[:, :, None, None]
        v = jnp.where(keep, v, 0).astype(self.dtype)
        return jnp.where(keep, depthwise_conv(v, kernel.astype(self.dtype)) + v, 0)


class CausalConv1d(nn.Module):
    """A 1-D convolution that sees k − 1 frames before each and none behind, kernel layout [k, in, out].

    One product of the k shifted inputs side by side, which is faster than a `lax` convolution on a CPU and what a matrix
    unit computes anyway.

    Attributes:
      shape: (kernel size, input channels, output channels). axes: their logical names. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    axes: Axes
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D_in"], tail: Float[Array, "B k_less_1 D_in"] | None = None
    ) -> Float[Array, "B T D_out"]:
        """Convolves T frames behind `tail`, the last inputs of the call before; None: zeros, the start of a sequence."""
        size = self.shape[0]
        kernel = self.param("kernel", partitioned(fan_in_init(2, 3), self.axes), self.shape).astype(self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), self.shape[-1:])
        x = x.astype(self.dtype)
        if tail is None:
            tail = jnp.zeros((x.shape[0], size - 1, x.shape[2]), x.dtype)
        padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        taps = [padded[:, i : i + x.shape[1]] for i in range(size)]
        y = contract(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, self.shape[2]), 1)
        return y + bias.astype(self.dtype)


def next_tail(
    tail: Float[Array, "B K D"], x: Float[Array, "B T D"], num_valid: Int[Array, " B"]
) -> Float[Array, "B K D"]:
    """The last K inputs once the first `num_valid` frames of x have followed `tail`: its state for the next step."""
    seen = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    places = num_valid[:, None] + jnp.arange(tail.shape[1])
    return jnp.take_along_axis(seen, places[:, :, None], axis=1)
