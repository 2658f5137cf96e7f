"""Speech tokens to one vector a mel frame: look-ahead convolution, conformer blocks, upsampling, conformer blocks.

Source: `transformer/upsample_encoder.py` (spec/official.md 4.2), paper 2.4. A step computes a hop of tokens once the
LOOKAHEAD tokens behind it are known; positions count from the start of the prompt.
"""

import math
import typing
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.nn.cache import KeyValueCache, append, init_cache
from cv2jax.nn.conformer import ConformerBlock, step_context, whole_context
from cv2jax.nn.conv import CausalConv1d, next_tail
from cv2jax.nn.init import init_by_digits, num_digits
from cv2jax.nn.layers import LayerNorm, Linear, partitioned
from cv2jax.nn.stack import apply_stack

_LEAK = 0.01  # of the rectifier in the look-ahead convolution: torch's default
_UPSAMPLE_TAPS = 5


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class EncoderState:
    """What a stream carries from hop to hop.

    Attributes:
      lookahead_tail: [B 2 D] and upsample_tail: [B 4 D], inputs of the causal convolutions.
      tokens, frames: keys and values of the blocks at 25 and at 50 Hz.
    """

    lookahead_tail: Float[Array, "B 2 D"]
    upsample_tail: Float[Array, "B 4 D"]
    tokens: KeyValueCache
    frames: KeyValueCache


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class StepPlaces:
    """Where a step stands: positions of its tokens [B L] and frames [B F], EMPTY where there is none.

    The first `num_pinned` [B] tokens of a row keep their slots in the caches (see `append`).
    """

    tokens: Int[Array, "B L"]
    frames: Int[Array, "B F"]
    num_pinned: Int[Array, " B"]


def init_encoder_state(config: FlowMatchingConfig, batch_size: int, num_slots: int) -> EncoderState:
    """Before the first hop, with room for `num_slots` tokens."""
    c = config.encoder
    cache = lambda layers, slots: init_cache(  # noqa: E731
        layers, batch_size, c.num_heads, slots, c.width // c.num_heads, config.dtype
    )
    return EncoderState(
        lookahead_tail=jnp.zeros((batch_size, 2, c.width), config.dtype),
        upsample_tail=jnp.zeros((batch_size, _UPSAMPLE_TAPS - 1, c.width), config.dtype),
        tokens=cache(c.num_layers, num_slots),
        frames=cache(c.num_upsampled_layers, num_slots * FRAMES_PER_TOKEN),
    )


class InputLayer(nn.Module):
    """√D · norm(linear(x)): what stands before each of the two stacks."""

    width: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, deterministic: bool) -> Float[Array, "B T D"]:
        """Maps [B, T, D] to [B, T, D]."""
        h = Linear((self.width, self.width), ("embed", "mlp"), dtype=self.dtype, name="linear")(x)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        return drop(drop(LayerNorm(name="norm")(h)) * math.sqrt(self.width))  # twice, as upstream


class LookaheadConv(nn.Module):
    """x + conv2(leaky(conv1(x))): conv1 sees LOOKAHEAD tokens ahead, conv2 two of its outputs back."""

    width: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T_ahead D"], tail: Float[Array, "B 2 D"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """(y, inputs of conv2) of the T = T_ahead − LOOKAHEAD tokens that have all they look at; `tail`: of CausalConv1d."""
        conv = lambda size, name: CausalConv1d(  # noqa: E731
            (size, self.width, self.width), ("conv", "embed", "mlp"), self.dtype, name=name
        )
        # A convolution that looks ahead is a causal one on what comes LOOKAHEAD later.
        h = jax.nn.leaky_relu(conv(LOOKAHEAD + 1, "ahead")(x)[:, LOOKAHEAD:], _LEAK)
        return x[:, :-LOOKAHEAD] + conv(3, "behind")(h, tail), h


class FlowEncoder(nn.Module):
    """`EncoderState` in and out for a step, None for a whole sequence.

    Attributes:
      config: of the model. masks_padding: False leaks padding into the last tokens of shorter rows of a batch as
        upstream does in training (quirk Q15), for parity with its numbers only.
    """

    config: FlowMatchingConfig
    masks_padding: bool = True

    @nn.compact
    def __call__(
        self,
        speech_tokens: Int[Array, "B L_ahead"],
        num_tokens: Int[Array, " B"],
        num_lookahead: Int[Array, " B"],
        masks: tuple[Bool[Array, "#B 1 L keys"], Bool[Array, "#B 1 F frame_keys"]],
        state: EncoderState | None = None,
        places: StepPlaces | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B F D"], EncoderState | None]:
        """Encodes L = L_ahead − LOOKAHEAD tokens into F = 2·L frames.

        Args:
          speech_tokens: the tokens, and up to LOOKAHEAD ones behind them that are only looked at.
          num_tokens: of them are computed in each row. num_lookahead: that follow them.
          masks: which tokens and which frames see each other; of a step S cached and L new keys.
          state, places: of a step.
        """
        c, dtype = self.config.encoder, self.config.dtype
        num_codes = self.config.num_speech_tokens
        is_official = self.config.token_init == "official"
        # Vectors of about length 1 move ten times faster, as the norm behind them sees it.
        init = nn.initializers.normal(1.0 if is_official else c.width**-0.5)
        if not is_official and (digits := num_digits(num_codes)):
            init = init_by_digits(init, digits, 0)
        table = self.param("token_embedding", partitioned(init, ("vocab", "embed")), (num_codes, c.width))
        known = (jnp.arange(speech_tokens.shape[1]) < (num_tokens + num_lookahead)[:, None])[..., None]
        x = jnp.where(known, table.astype(dtype)[speech_tokens], 0)
        x = InputLayer(c.width, c.dropout, dtype, name="token_input")(x, deterministic=deterministic)
        if not self.masks_padding:
            known = (jnp.arange(speech_tokens.shape[1]) < speech_tokens.shape[1] - LOOKAHEAD)[:, None]
        x = jnp.where(known, x, 0)
        tails = (None, None) if state is None else (state.lookahead_tail, state.upsample_tail)
        x, h = LookaheadConv(c.width, dtype, name="lookahead")(x, tails[0])
        at: tuple[Any, Any] = (None, None)
        if state is not None and places is not None:
            at = ((places.tokens, state.tokens), (places.frames, state.frames))
        x, tokens = self._stack("blocks", c.num_layers, x, masks[0], at[0], deterministic)
        up = jnp.repeat(x, FRAMES_PER_TOKEN, axis=1)
        shape = (_UPSAMPLE_TAPS, c.width, c.width)
        x = CausalConv1d(shape, ("conv", "embed", "mlp"), dtype, name="upsample")(up, tails[1])
        x = InputLayer(c.width, c.dropout, dtype, name="frame_input")(x, deterministic=deterministic)
        x, frames = self._stack("frame_blocks", c.num_upsampled_layers, x, masks[1], at[1], deterministic)
        x = LayerNorm(name="final_norm")(x)
        if state is None or places is None:
            return x, None
        pinned = places.num_pinned
        state = EncoderState(
            lookahead_tail=next_tail(state.lookahead_tail, h, num_tokens),
            upsample_tail=next_tail(state.upsample_tail, up, num_tokens * FRAMES_PER_TOKEN),
            tokens=append(state.tokens, tokens, positions=places.tokens, num_pinned=pinned),
            frames=append(state.frames, frames, positions=places.frames, num_pinned=pinned * FRAMES_PER_TOKEN),
        )
        return x, state

    def _stack(
        self,
        name: str,
        num_layers: int,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B 1 T keys"],
        at: tuple[Int[Array, "B T"], KeyValueCache] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config.encoder
        layers = None if at is None else jnp.arange(num_layers)
        context = whole_context(mask, c.width) if at is None else step_context(mask, *at, c.width)
        fields = {
            "width": c.width,
            "num_heads": c.num_heads,
            "mlp_dim": c.mlp_dim,
            "dropout": c.dropout,
            "dtype": self.config.dtype,
        }
        options = {"remat": self.config.remat, "scan": self.config.scan_layers, "name": name}
        return apply_stack(
            ConformerBlock, fields, x, layers, context, num_layers=num_layers, deterministic=deterministic, **options
        )
