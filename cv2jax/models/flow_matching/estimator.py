"""The velocity network: a causal UNet of one level over mel frames (spec/official.md 4.4, Matcha-TTS's decoder).

It works in whole sequences and in steps: a step is given the convolutions' last inputs (`EstimatorTails`) and the keys and
values of the frames before it, and hands out those of its own frames.
"""

import types
import typing
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.models.flow_matching.config import EstimatorConfig, FlowMatchingConfig
from cv2jax.nn.attention import attend
from cv2jax.nn.cache import KeysValues, KeyValueCache, attend_cached, heads_first
from cv2jax.nn.conv import CausalConv1d, next_tail
from cv2jax.nn.layers import FeedForward, LayerNorm, Linear, identity_init
from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.stack import apply_stack
from cv2jax.parallel.sharding import constrain

KERNEL_SIZE = 3
# How training starts, of no interest to weights that are loaded: with the noise on its way to the output nearly as it came,
# and the velocity at that of the mean mel. On a small corpus this saves the first 300 steps.
_BRANCH_SCALE = 0.1
_MEAN_LOG_MEL = -6.0
Tail = Float[Array, "... B 2 _"]


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class EstimatorTails:
    """The last inputs of the causal convolutions: two of each stage's block (of the middle stages stacked), and single ones."""

    down: tuple[Tail, Tail]
    down_conv: Tail
    mid: tuple[Tail, Tail]
    up: tuple[Tail, Tail]
    up_conv: Tail
    final: Tail


def init_tails(config: FlowMatchingConfig, batch_size: int) -> EstimatorTails:
    """Zeros: the start of a sequence."""
    e, width = config.estimator, config.estimator.width
    zeros = lambda channels, *stack: jnp.zeros((*stack, batch_size, KERNEL_SIZE - 1, channels), config.dtype)  # noqa: E731
    return EstimatorTails(
        down=(zeros(4 * config.num_mels), zeros(width)),
        down_conv=zeros(width),
        mid=(zeros(width, e.num_mid_stages), zeros(width, e.num_mid_stages)),
        up=(zeros(2 * width), zeros(width)),
        up_conv=zeros(width),
        final=zeros(width),
    )


def num_attention_layers(config: EstimatorConfig) -> int:
    """Transformer blocks of the network."""
    return (config.num_mid_stages + 2) * config.num_blocks


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class EstimatorContext:
    """What all stages share.

    Attributes:
      time: [B D_time], the embedded time. mask: which frames see each other, of a step an array [#B 1 T S+T].
      cache: of a step, of all attention layers. num_frames: [B], of a step, that are valid.
    """

    time: Float[Array, "B D_time"]
    mask: Any
    cache: KeyValueCache | None = None
    num_frames: Int[Array, " B"] | None = None

    def next_tail(self, tail: Tail | None, x: Float[Array, "B T D"]) -> Any:
        """The state of a convolution behind this step; None for a whole sequence."""
        return None if tail is None or self.num_frames is None else next_tail(tail, x, self.num_frames)


class TransformerBlock(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)).

    Attributes:
      config: sizes. impl: of `attend`. dtype: computation dtype.
    """

    config: EstimatorConfig
    impl: str
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | None, deterministic: bool, context: EstimatorContext
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """Returns (x, of a step its keys and values [B H T C]): the call shape of `apply_stack`; there is no dropout."""
        c = self.config
        h = LayerNorm(name="attention_norm")(x)
        shape, axes = (c.width, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        project = lambda name: Linear(shape, axes, use_bias=False, dtype=self.dtype, name=name)(h)  # noqa: E731
        q, k, v = (constrain(project(name), "batch", "length", "act_heads", None) for name in ("query", "key", "value"))
        if layer is None or context.cache is None:
            y, entries = attend(q, k, v, mask=context.mask, impl=self.impl), None
        else:
            entries = (heads_first(k), heads_first(v))
            y = attend_cached(q, entries, context.cache, layer, context.mask)
        options: dict[str, Any] = {"num_input_axes": 2, "init_scale": _BRANCH_SCALE, "dtype": self.dtype}
        x = x + Linear((*shape[1:], c.width), (*axes[1:], "embed"), name="out", **options)(y)
        mlp = FeedForward(c.width, c.mlp_ratio * c.width, dtype=self.dtype, out_scale=_BRANCH_SCALE, name="mlp")
        x = x + mlp(LayerNorm(name="mlp_norm")(x))
        return constrain(x, "batch", "length", "act_embed"), entries


class ConvBlock(nn.Module):
    """mish(norm(conv(x))), the convolution causal.

    Attributes:
      width: of the output. dtype: computation dtype.
    """

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D_in"], tail: Tail | None) -> Float[Array, "B T D"]:
        """Maps [B, T, D_in] behind `tail` to [B, T, D]."""
        x = _conv(self.width, self.dtype, "conv")(x, tail)
        return jax.nn.mish(LayerNorm(name="norm")(x))


class Stage(nn.Module):
    """A residual block of two convolutions that is told the time, then transformer blocks.

    Attributes:
      config: of the model. impl: of `attend`.
    """

    config: FlowMatchingConfig
    impl: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D_in"],
        state: tuple[Int[Array, ""], tuple[Tail, Tail]] | None,
        deterministic: bool,
        context: EstimatorContext,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, None), or of a step (first layer in the cache, tails) to (x, (keys and values [layers B H T C], tails))."""
        c, dtype = self.config.estimator, self.config.dtype
        layer, tails = (None, (None, None)) if state is None else state
        time = Linear((context.time.shape[1], c.width), ("embed", "mlp"), dtype=dtype, name="time")
        first = ConvBlock(c.width, dtype, name="block1")(x, tails[0])
        first = first + time(jax.nn.mish(context.time))[:, None]
        second = ConvBlock(c.width, dtype, name="block2")(first, tails[1])
        residual = Linear(
            (x.shape[2], c.width), (None, "embed"), dtype=dtype, kernel_init=identity_init, name="residual"
        )
        y = second + residual(x)
        layers = None if layer is None else layer + jnp.arange(c.num_blocks)
        fields = {"config": c, "impl": self.impl, "dtype": dtype}
        options: dict[str, Any] = {"num_layers": c.num_blocks, "scan": self.config.scan_layers}
        options |= {"deterministic": deterministic, "axis": "inner_layers"}
        y, entries = apply_stack(TransformerBlock, fields, y, layers, context, **options)
        if state is None:
            return y, None
        return y, (entries, (context.next_tail(tails[0], x), context.next_tail(tails[1], first)))


class Estimator(nn.Module):
    """The velocity of every frame.

    Attributes: as Stage.
    """

    config: FlowMatchingConfig
    impl: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F M"],
        time: Float[Array, " B"],
        mu: Float[Array, "B F M"],
        speaker: Float[Array, "B M"],
        prompt_mel: Float[Array, "B F M"],
        mask: MaskSpec | Bool[Array, "#B 1 F keys"],
        *,
        tails: EstimatorTails | None = None,
        cache: KeyValueCache | None = None,
        first_layer: Int[Array, ""] | int = 0,
        num_frames: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B F M"], EstimatorTails | None, KeysValues | None]:
        """(velocity in fp32, and of a step its tails and the keys and values [layers B H F C] of its frames).

        Args:
          x: where the frames are at `time`. mu: encoded tokens. speaker, prompt_mel: conditions, 0 where there is none.
          mask: which frames see each other; of a step S cached and F new keys.
          tails, cache, num_frames: of a step; its layers lie in the cache from `first_layer` on.
        """
        c, e, dtype = self.config, self.config.estimator, self.config.dtype
        inputs = [x, mu, jnp.broadcast_to(speaker[:, None], x.shape), prompt_mel]
        h = jnp.concatenate([part.astype(dtype) for part in inputs], axis=-1)
        embedded = TimeEmbedding(4 * c.num_mels, 4 * e.width, dtype, name="time")(time)
        context = EstimatorContext(time=embedded, mask=mask, cache=cache, num_frames=num_frames)
        is_step = tails is not None
        state = lambda tails, layer: (first_layer + layer, tails) if is_step else None  # noqa: E731
        none = types.SimpleNamespace(**dict.fromkeys(EstimatorTails.__dataclass_fields__))
        t: Any = none if tails is None else tails
        fields, conv = {"config": c, "impl": self.impl}, lambda name: _conv(e.width, dtype, name)
        parts: dict[str, Any] = {}
        h, parts["down"] = self._stage("down")(h, state(t.down, 0), True, context)
        skip = h
        h, down_conv = conv("down_conv")(h, t.down_conv), context.next_tail(t.down_conv, h)
        layers = e.num_blocks * (1 + jnp.arange(e.num_mid_stages))
        options = {"remat": c.remat, "scan": c.scan_layers, "name": "mid"}
        h, parts["mid"] = apply_stack(
            Stage,
            fields,
            h,
            state(t.mid, layers),
            context,
            num_layers=e.num_mid_stages,
            deterministic=True,
            **options,
        )
        h = jnp.concatenate([h, skip], axis=-1)
        h, parts["up"] = self._stage("up")(h, state(t.up, e.num_blocks * (1 + e.num_mid_stages)), True, context)
        h, up_conv = conv("up_conv")(h, t.up_conv), context.next_tail(t.up_conv, h)
        final = context.next_tail(t.final, h)
        h = ConvBlock(e.width, dtype, name="final")(h, t.final)
        options = {"dtype": dtype, "initial_bias": _MEAN_LOG_MEL, "name": "velocity"}
        velocity = Linear((e.width, c.num_mels), ("embed", None), **options)(h).astype(jnp.float32)
        if not is_step:
            return velocity, None, None
        flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731  (stages and blocks to layers)
        join = lambda down, mid, up: jnp.concatenate([down, flat(mid), up])  # noqa: E731
        entries = jax.tree.map(join, *(parts[name][0] for name in ("down", "mid", "up")))
        of_stages = {name: part[1] for name, part in parts.items()}
        tails = EstimatorTails(**of_stages, down_conv=down_conv, up_conv=up_conv, final=final)
        return velocity, tails, entries

    def _stage(self, name: str) -> Stage:
        remat = self.config.remat != "none"
        block = nn.remat(Stage, static_argnums=(3,)) if remat else Stage
        return block(self.config, self.impl, name=name)


class TimeEmbedding(nn.Module):
    """linear(silu(linear(sinusoids of 1000·t))).

    Attributes:
      num_sinusoids: of the first layer's inputs. width: of the output. dtype: computation dtype.
    """

    num_sinusoids: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, time: Float[Array, " B"]) -> Float[Array, "B D"]:
        """Embeds a time in 0 … 1."""
        half = self.num_sinusoids // 2
        frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(jnp.log(10000.0) / (half - 1)))
        angles = 1000.0 * time[:, None] * frequencies
        h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        h = Linear((self.num_sinusoids, self.width), (None, "mlp"), dtype=self.dtype, name="up")(h)
        return Linear((self.width, self.width), ("mlp", "embed"), dtype=self.dtype, name="down")(jax.nn.silu(h))


def _conv(width: int, dtype: str, name: str) -> Any:
    """A causal convolution to `width` channels, from whatever comes."""

    def apply(x: Float[Array, "B T D"], tail: Tail | None) -> Float[Array, "B T width"]:
        shape = (KERNEL_SIZE, x.shape[2], width)
        return CausalConv1d(shape, ("conv", None, "embed"), dtype, name=name)(x, tail)

    return apply
