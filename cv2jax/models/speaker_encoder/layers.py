"""Layers of CAM++: convolutions over time and over time and frequency, batch norm with its statistics as arguments, masks.

Statistics go in and come out as nested dicts that mirror the modules; `None` goes in where there are none yet.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from cv2jax.nn.layers import Axes, Linear, contract, fan_in_init, partitioned
from cv2jax.parallel.sharding import constrain

EPSILON, MOMENTUM = 1e-5, 0.1  # torch's
INIT_SCALE = math.sqrt(2)  # Kaiming normal, as 3D-Speaker starts its convolutions


def keep(x: Float[Array, "B T ..."], mask: Bool[Array, "B T"]) -> Float[Array, "B T ..."]:
    """x, 0 where the mask is False: what a convolution at the end of a row must see, whatever lies there."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, 0)


class BatchNorm(nn.Module):
    """Batch norm over every axis but the last, in fp32, of the positions that a mask keeps.

    Over a sharded batch the sums run over all of it. torch's rules: the variance that divides is the biased one, the one
    that is averaged the unbiased. A batch without two positions leaves the statistics as they are.

    Attributes:
      affine: whether to scale and shift.
    """

    affine: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *rest D"], mask: Bool[Array, "B *some"], running: PyTree, training: bool
    ) -> tuple[Float[Array, "B *rest D"], PyTree]:
        """(normalised x, its {"mean" [D], "variance" [D]}): by its own in training, else by `running`, which stays."""
        wide, shape = x.astype(jnp.float32), x.shape[-1:]
        running = {"mean": jnp.zeros(shape), "variance": jnp.ones(shape)} if running is None else running
        mean, variance = running["mean"], running["variance"]
        if training:
            inner, axes = x.shape[mask.ndim : -1], tuple(range(x.ndim - 1))
            count = jnp.sum(mask).astype(jnp.float32) * math.prod(inner)
            kept = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
            mean = jnp.sum(jnp.where(kept, wide, 0), axes) / jnp.maximum(count, 1)
            square = jnp.sum(jnp.where(kept, jnp.square(wide - mean), 0), axes)
            variance = square / jnp.maximum(count, 1)
            share = jnp.where(count > 1, MOMENTUM, 0.0)
            fresh = {"mean": mean, "variance": square / jnp.maximum(count - 1, 1)}
            running = jax.tree.map(lambda old, new: old + share * jax.lax.stop_gradient(new - old), running, fresh)
        y = (wide - mean) * jax.lax.rsqrt(variance + EPSILON)
        if self.affine:
            y = y * self.param("scale", partitioned(nn.initializers.ones, ("norm",)), shape)
            y = y + self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), shape)
        return y.astype(x.dtype), running


class TimeConv(nn.Module):
    """A 1-D convolution over time without a bias, zeros around it, kernel layout [k, in, out].

    One product of the k shifted inputs side by side, as `CausalConv1d`.

    Attributes:
      shape: (odd kernel size, input channels, output channels). axes: their logical names.
      stride, dilation: in frames. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    axes: Axes
    stride: int = 1
    dilation: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D_in"]) -> Float[Array, "B U D_out"]:
        """Maps T frames to ceil(T / stride)."""
        size, padding = self.shape[0], self.dilation * (self.shape[0] // 2)
        kernel = self.param("kernel", partitioned(fan_in_init(2, 3, INIT_SCALE), self.axes), self.shape)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (padding, padding), (0, 0)))
        taps = [padded[:, i * self.dilation :][:, : x.shape[1] : self.stride] for i in range(size)]
        return contract(jnp.concatenate(taps, axis=-1), kernel.astype(self.dtype).reshape(-1, self.shape[2]), 1)


class TimeFrequencyConv(nn.Module):
    """A 2-D convolution over time and frequency without a bias, zeros around it, kernel layout [k_time, k_freq, in, out].

    Attributes:
      shape: (kernel size, input channels, output channels), the same size both ways.
      stride: over frequency; 1 over time. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T M D_in"]) -> Float[Array, "B T N D_out"]:
        """Maps M bands to ceil(M / stride)."""
        size, channels = self.shape[0], self.shape[1:]
        init = partitioned(fan_in_init(3, 4, INIT_SCALE), ("conv", None, None, None))
        kernel = self.param("kernel", init, (size, size, *channels))
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, self.stride),
            padding=[(size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def segment_context(
    x: Float[Array, "B T D"], mask: Bool[Array, "B T"], segment: int, partial: str
) -> Float[Array, "B S D"]:
    """The mean of each row's kept frames plus that of each segment of `segment` frames, S = ceil(T / segment); fp32.

    `partial`: "count" divides a segment by the frames that it has, "kernel" by `segment` (spec/frontends.md 0.3).
    """
    kept = keep(x.astype(jnp.float32), mask)
    padding = -x.shape[1] % segment
    parts = jnp.pad(kept, ((0, 0), (0, padding), (0, 0))).reshape(x.shape[0], -1, segment, x.shape[2])
    counts = jnp.pad(mask, ((0, 0), (0, padding))).reshape(x.shape[0], -1, segment).sum(2)[..., None]
    sums = jnp.sum(parts, axis=2)
    whole = jnp.sum(sums, axis=1, keepdims=True) / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
    return whole + sums / (segment if partial == "kernel" else jnp.maximum(counts, 1))


class ContextMasking(nn.Module):
    """A convolution over time whose output channels are damped by what the whole row and the segment sound like.

    Attributes:
      width: input channels. growth: output channels. dilation: in frames. segment, partial: as `segment_context`.
      dtype: computation dtype.
    """

    width: int
    growth: int
    dilation: int
    segment: int
    partial: str
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """Maps [B, T, D] to [B, T, growth]."""
        x, shape, options = keep(x, mask), (3, self.width, self.growth), {"dtype": self.dtype}
        y = TimeConv(shape, ("conv", "mlp", None), dilation=self.dilation, name="local", **options)(x)
        context = segment_context(x, mask, self.segment, self.partial)
        # A segment has one context: the layers on it see segments, not frames.
        half = self.width // 2
        scale = {"init_scale": INIT_SCALE}
        h = Linear((self.width, half), ("mlp", None), name="down", **options, **scale)(context)
        gate = Linear((half, self.growth), (None, None), name="up", **options, **scale)(jax.nn.relu(h))
        gate = jnp.repeat(jax.nn.sigmoid(gate), self.segment, axis=1)[:, : x.shape[1]]
        return y * gate


class DenseLayer(nn.Module):
    """Norm, bottleneck, norm, context masking; its output goes behind the input channels (D-TDNN).

    Attributes: as `ContextMasking`; width: the bottleneck's channels.
    """

    width: int
    growth: int
    dilation: int
    segment: int
    partial: str
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], norms: PyTree, training: bool
    ) -> tuple[Float[Array, "B T E"], PyTree]:
        """(x with `growth` channels more, statistics)."""
        given, made = norms or {}, {}
        h, made["norm1"] = BatchNorm(name="norm1")(x, mask, given.get("norm1"), training)
        shape, axes = (x.shape[-1], self.width), ("embed", "mlp")
        options = {"use_bias": False, "init_scale": INIT_SCALE, "dtype": self.dtype}
        h = Linear(shape, axes, name="bottleneck", **options)(jax.nn.relu(h))
        h = constrain(h, "batch", "length", "act_mlp")
        h, made["norm2"] = BatchNorm(name="norm2")(h, mask, given.get("norm2"), training)
        h = ContextMasking(
            self.width, self.growth, self.dilation, self.segment, self.partial, self.dtype, name="context"
        )(jax.nn.relu(h), mask)
        return jnp.concatenate([x, h.astype(x.dtype)], axis=-1), made


def masked_statistics(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
    """Mean and unbiased standard deviation of each row's kept frames behind one another, E = 2·D; fp32.

    The gradient of a deviation of 0 is 0, as in torch.
    """
    wide = x.astype(jnp.float32)
    count = jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32)
    mean = jnp.sum(keep(wide, mask), axis=1) / jnp.maximum(count, 1)
    square = jnp.sum(keep(jnp.square(wide - mean[:, None]), mask), axis=1)
    variance = square / jnp.maximum(count - 1, 1)
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return jnp.concatenate([mean, deviation], axis=-1)
