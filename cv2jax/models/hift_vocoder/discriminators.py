"""What tells generated waves from recorded ones: folded by several periods, and as spectrograms of several resolutions.

Source: `matcha/hifigan/models.py` and `hifigan/discriminator.py` (spec/official.md 5.6). Kernels are stored as they act,
without upstream's weight normalisation (`convert/weight_norm.py` goes between the two).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cv2jax.audio.stft import DftKind, frame, hann_window, power_spectrum
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig
from cv2jax.models.hift_vocoder.losses import feature_matching_loss
from cv2jax.nn.layers import Axes, contract, fan_in_init, partitioned
from cv2jax.parallel.sharding import constrain

SLOPE = 0.1  # of the leaky ReLU below zero
PERIOD_KERNEL, PERIOD_STRIDE = 5, 3
# Kernel and stride of the layers of a spectral discriminator: (frames, bins).
SPECTRAL_KERNELS = ((3, 9), (3, 9), (3, 9), (3, 9), (3, 3))
SPECTRAL_STRIDES = (1, 2, 2, 2, 1)  # over bins; frames are never skipped
MIN_MAGNITUDE = 1e-7  # below it a magnitude has no slope: at 0 it would be NaN
T = TypeVar("T")


@flax.struct.dataclass
class Judgement:
    """What one discriminator makes of a batch of waves."""

    scores: Float[Array, "B N"]  # fp32; trained towards 1 for recorded, 0 for generated; in the official order
    feature_maps: tuple[Float[Array, "B ... _"], ...]  # of every layer, the scores' own [..., 1] last; channels last


@flax.struct.dataclass
class Comparison:
    """What one discriminator makes of generated waves beside the recorded ones."""

    generated: Float[Array, "B N"]  # scores, fp32
    recorded: Float[Array, "B N"]
    feature_loss: Float[Array, ""]  # `feature_matching_loss` of this discriminator


class Discriminators(nn.Module):
    """All discriminators of a config, the periods' first.

    Attributes:
      config: sizes. dtype: computation dtype. dft: how spectra are computed (`audio.stft.power_spectrum`).
      remat: a gradient of `compare` computes the activations of one discriminator after the other anew.
    """

    config: DiscriminatorConfig
    dtype: str = "float32"
    remat: bool = False
    dft: DftKind = "matmul"

    def __call__(self, waveform: Float[Array, "B W"]) -> tuple[Judgement, ...]:
        """Judges waves [B W] in [-1, 1], all W samples of them."""
        return self._each(lambda judge: judge(waveform))

    def compare(self, generated: Float[Array, "B W"], recorded: Float[Array, "B W"]) -> tuple[Comparison, ...]:
        """Judges both: all that the losses of the two networks look at, without the feature maps."""
        one: Any = nn.remat(_compare) if self.remat else _compare
        return self._each(lambda judge: one(judge, generated, recorded))

    @nn.compact
    def _each(self, ask: Callable[[Any], T]) -> tuple[T, ...]:
        c = self.config
        judges: list[nn.Module] = [
            PeriodDiscriminator(period, c.period_channels, self.dtype, name=f"period_{i}")
            for i, period in enumerate(c.periods)
        ]
        resolutions = zip(c.fft_sizes, c.hop_lengths, c.window_lengths, strict=True)
        judges += [
            SpectralDiscriminator(*resolution, c.spectral_channels, self.dtype, self.dft, name=f"spectral_{i}")
            for i, resolution in enumerate(resolutions)
        ]
        return tuple(ask(judge) for judge in judges)


def _compare(judge: Any, generated: Float[Array, "B W"], recorded: Float[Array, "B W"]) -> Comparison:
    made, real = judge(generated), judge(recorded)
    return Comparison(
        generated=made.scores,
        recorded=real.scores,
        feature_loss=feature_matching_loss([real.feature_maps], [made.feature_maps]),
    )


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample as a sequence of its own (HiFi-GAN, Kong et al. 2020, section 2.3).

    Upstream's (5, 1) kernels never look across the columns of [W/period, period]: here each column is a row of the batch
    and the layer a convolution over time.

    Attributes:
      period: samples. channels: of each layer; all but the last stride by 3. dtype: computation dtype.
    """

    period: int
    channels: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, waveform: Float[Array, "B W"]) -> Judgement:
        """Judges waves [B W]; feature maps are [B period L D], scores [B L·period]."""
        rows = len(waveform)
        columns = fold(waveform, self.period)
        x = constrain(columns.reshape(-1, columns.shape[2], 1), "batch", "length", None)
        maps, before = [], 1
        for i, width in enumerate(self.channels):
            stride = PERIOD_STRIDE if i + 1 < len(self.channels) else 1
            x = _activate(_conv_over_time(PERIOD_KERNEL, before, width, stride, self.dtype, f"convs_{i}")(x))
            maps.append(x)
            before = width
        maps.append(_conv_over_time(3, before, 1, 1, self.dtype, "out")(x))
        unfolded = tuple(m.reshape(rows, self.period, *m.shape[1:]) for m in maps)
        scores = jnp.swapaxes(unfolded[-1][..., 0], 1, 2).reshape(rows, -1)  # time first, as upstream flattens them
        return Judgement(scores=scores.astype(jnp.float32), feature_maps=unfolded)


def _conv_over_time(size: int, before: int, after: int, stride: int, dtype: str, name: str) -> "StridedConv":
    return StridedConv((size, before, after), stride, dtype, name=name)


def _axes(before: int, after: int) -> Axes:
    """Of the channels of a kernel: the larger side is what FSDP splits, tensor parallelism neither.

    With the outputs split by tensor, XLA's partitioner adds the gradient of the inputs up wrongly on a mesh of three axes
    (jaxlib 0.10.2, data = fsdp = tensor = 2); and layers this narrow would wait for each other more than they compute.
    """
    return ("embed", None) if before > after else (None, "embed")


def fold(waveform: Float[Array, "B W"], period: int) -> Float[Array, "B period L"]:
    """Every `period`-th sample as a row, L = ⌈W / period⌉; the end is reflected up to a multiple of the period."""
    short = -waveform.shape[1] % period
    padded = jnp.pad(waveform, ((0, 0), (0, short)), mode="reflect")
    return jnp.swapaxes(padded.reshape(len(waveform), -1, period), 1, 2)


class StridedConv(nn.Module):
    """A strided convolution over time, same padding, kernel layout [k, in, out], k odd.

    One product of the inputs under the kernel side by side, which on a CPU is faster than a `lax` convolution.

    Attributes:
      shape: of the kernel. stride: in inputs. dtype: computation dtype.
    """

    shape: tuple[int, int, int]
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "rows T D_in"]) -> Float[Array, "rows L D_out"]:
        """Maps T inputs to L = (T - 1) // stride + 1."""
        size, before, after = self.shape
        axes = ("conv", *_axes(before, after))
        kernel = self.param("kernel", partitioned(fan_in_init(2, 3), axes), self.shape).astype(self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), self.shape[-1:])
        length, steps = (x.shape[1] - 1) // self.stride + 1, -(-size // self.stride)
        folded = fold_stride(x.astype(self.dtype), size, self.stride)
        parts = [folded[:, i : i + length] for i in range(steps)]
        seen = jnp.concatenate(parts, axis=-1)[..., : size * before]
        return contract(seen, kernel.reshape(-1, after), 1) + bias.astype(self.dtype)


class SpectralDiscriminator(nn.Module):
    """Sees the magnitude spectrogram of one resolution as an image of frames and bins.

    Attributes:
      fft_size: points. hop_length, window_length: samples. channels: of every layer. dtype: computation dtype of the
        convolutions, spectra are fp32. dft: how they are computed.
    """

    fft_size: int
    hop_length: int
    window_length: int
    channels: int
    dtype: str = "float32"
    dft: DftKind = "matmul"

    @nn.compact
    def __call__(self, waveform: Float[Array, "B W"]) -> Judgement:
        """Judges waves [B W]; feature maps are [B F bins D], scores [B F·bins]."""
        image = magnitudes(waveform, self.fft_size, self.hop_length, self.window_length, self.dft)
        x = constrain(image[..., None], "batch", "length", None, None)
        maps, before = [], 1
        for i, (size, stride) in enumerate(zip(SPECTRAL_KERNELS, SPECTRAL_STRIDES, strict=True)):
            conv = BinConv((*size, before, self.channels), stride, self.dtype, name=f"convs_{i}")
            x = _activate(conv(x))
            maps.append(x)
            before = self.channels
        maps.append(BinConv((3, 3, before, 1), 1, self.dtype, name="out")(x))
        scores = maps[-1].reshape(len(waveform), -1).astype(jnp.float32)
        return Judgement(scores=scores, feature_maps=tuple(maps))


def magnitudes(
    waveform: Float[Array, "B W"], fft_size: int, hop_length: int, window_length: int, dft: DftKind = "matmul"
) -> Float[Array, "B F bins"]:
    """|STFT| of `torch.stft`'s defaults: Hann, centred on every hop, ends reflected; F = W // hop + 1, bins = fft / 2 + 1.

    torch centres a short window in the frame of `fft_size`; a shift changes no magnitude, so only the window is framed.
    """
    half = window_length // 2
    padded = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (half, half)), mode="reflect")
    frames = frame(padded, window_length, hop_length, waveform.shape[1] // hop_length + 1)
    power = power_spectrum(frames * hann_window(window_length).astype(np.float32), fft_size, dft)
    return jnp.sqrt(jnp.maximum(power, MIN_MAGNITUDE**2))


class BinConv(nn.Module):
    """A convolution over frames and bins, same padding, that strides over bins; kernel layout [frames, bins, in, out].

    Attributes:
      shape: of the kernel, its two sizes odd. stride: over bins. dtype: computation dtype.
    """

    shape: tuple[int, int, int, int]
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B F bins D_in"]) -> Float[Array, "B F out_bins D_out"]:
        """Maps K bins to (K - 1) // stride + 1."""
        axes = (None, "conv", *_axes(*self.shape[2:]))
        kernel = self.param("kernel", partitioned(fan_in_init(3, 4), axes), self.shape).astype(self.dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), self.shape[-1:])
        return conv_over_bins(x.astype(self.dtype), kernel, self.stride) + bias.astype(self.dtype)


def conv_over_bins(
    x: Float[Array, "B F bins D_in"], kernel: Float[Array, "frames taps D_in D_out"], stride: int
) -> Float[Array, "B F out_bins D_out"]:
    """The convolution of `BinConv`, its stride folded into the channels: a kernel of n taps has ⌈n / stride⌉ steps by one.

    XLA's gradients of a strided two-dimensional convolution are slow on a CPU: so they take a fifth of the time.
    """
    num_frames, taps, before, after = kernel.shape
    steps = -(-taps // stride)
    kernel = jnp.pad(kernel, [(0, 0), (0, steps * stride - taps), (0, 0), (0, 0)])
    half = num_frames // 2
    x = jnp.pad(fold_stride(x, taps, stride), [(0, 0), (half, half), (0, 0), (0, 0)])
    return _correlate(x, kernel.reshape(num_frames, steps, stride * before, after))


def fold_stride(x: Float[Array, "*rows T D"], taps: int, stride: int) -> Float[Array, "*rows steps wide"]:
    """Inputs [… T D] of a same-padded convolution as [… L + ⌈taps/stride⌉ - 1, stride·D]: L outputs that move by one step."""
    before, steps = x.shape[-2], -(-taps // stride)
    total = ((before - 1) // stride + steps) * stride
    front = taps // 2
    # A negative pad cuts off what no step reaches.
    pads = [(0, 0, 0)] * (x.ndim - 2) + [(front, total - front - before, 0), (0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads).reshape(*x.shape[:-2], -1, stride * x.shape[-1])


def _convolve(x: Float[Array, "B F K I"], kernel: Float[Array, "f k I O"]) -> Float[Array, "B G L O"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def _correlate(x: Float[Array, "B F K I"], kernel: Float[Array, "f k I O"]) -> Float[Array, "B G L O"]:
    """A convolution without padding whose gradients are transposed by hand into convolutions of the same layout.

    XLA does it for a CPU only outside branches and loops: within, as in the warm-up's branch of the GAN step, jax's own
    gradients of a convolution run up to a hundred times slower (jaxlib 0.10.2).
    """
    return _convolve(x, kernel)


def _correlate_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel), (x, kernel)


def _correlate_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = saved
    high, wide = (size - 1 for size in kernel.shape[:2])
    padded = jnp.pad(slope, [(0, 0), (high, high), (wide, wide), (0, 0)])
    to_x = _convolve(padded, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    to_kernel = _convolve(x.transpose(3, 1, 2, 0), slope.transpose(1, 2, 0, 3))  # the batch is what is summed over
    return to_x, to_kernel.transpose(1, 2, 0, 3)


_correlate.defvjp(_correlate_forward, _correlate_backward)


def _activate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.leaky_relu(x, SLOPE)
