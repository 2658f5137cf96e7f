"""Conformer blocks without a convolution module: pre-norm attention over relative positions, and a SiLU MLP.

Source: wenet/espnet as in the official `transformer/{attention,encoder_layer}.py` (spec/official.md 4.2).
"""

import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.attention import MASKED_LOGIT
from cv2jax.nn.cache import KeysValues, KeyValueCache, attend_cached, heads_first
from cv2jax.nn.layers import LayerNorm, Linear, partitioned
from cv2jax.nn.relpos import relative_sinusoid, rotate_queries, shift, sinusoid
from cv2jax.parallel.sharding import constrain

_NORM_EPSILON = 1e-12


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class RelativeContext:
    """What all layers of a stack share; of a whole sequence, or of a step behind `cache`.

    Attributes:
      mask: [#B 1 T keys], which keys each query sees: the T positions themselves, of a step behind the S cached ones.
      distances: [2T−1 D], the sinusoids of a whole sequence.
      cache: of the stack. queries: [#B T] and keys: [#B S+T D], positions and sinusoids of a step.
    """

    mask: Bool[Array, "#B 1 T keys"]
    distances: typing.Any = None
    cache: KeyValueCache | None = None
    queries: typing.Any = None
    keys: typing.Any = None


def whole_context(mask: Bool[Array, "#B 1 T T"], width: int) -> RelativeContext:
    """The context of a sequence that is seen at once."""
    return RelativeContext(mask=mask, distances=relative_sinusoid(mask.shape[-1], width))


def step_context(
    mask: Bool[Array, "#B 1 T keys"], positions: Int[Array, "B T"], cache: KeyValueCache, width: int
) -> RelativeContext:
    """The context of a step; only distances matter, so positions are counted from its first: small angles are exact."""
    first = positions[:, :1]
    keys = jnp.concatenate([cache.positions, positions], axis=1) - first
    return RelativeContext(mask=mask, cache=cache, queries=positions - first, keys=sinusoid(keys, width))


class RelativeAttention(nn.Module):
    """Self-attention whose logits are ((q + u)·k_j + (q + v)·W p(i − j)) / √C, p the sinusoids of the distance.

    Attributes:
      width: D. num_heads: H. dropout: of the weights. dtype: computation dtype.
    """

    width: int
    num_heads: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | None, context: RelativeContext, *, deterministic: bool
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """Returns (y, of a step its keys and values [B H T C])."""
        head_dim = self.width // self.num_heads
        shape, axes = (self.width, self.num_heads, head_dim), ("embed", "heads", "head_dim")
        q, k, v = (Linear(shape, axes, dtype=self.dtype, name=name)(x) for name in ("query", "key", "value"))
        biases = [
            self.param(name, partitioned(nn.initializers.xavier_uniform(), axes[1:]), shape[1:]).astype(self.dtype)
            for name in ("content_bias", "position_bias")
        ]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", out_axis=(1, 2))
        kernel = self.param("position_kernel", partitioned(init, axes), shape).astype(self.dtype)
        q, q_position = q + biases[0], q + biases[1]
        if context.cache is None or layer is None:
            projected = jnp.einsum("rd,dhc->rhc", context.distances.astype(self.dtype), kernel)
            scores = shift(jnp.einsum("bthc,rhc->bhtr", q_position, projected, preferred_element_type=jnp.float32))
            logits = jnp.einsum("bthc,bshc->bhts", q, k, preferred_element_type=jnp.float32) + scores
            weights = jax.nn.softmax(logits * head_dim**-0.5 + jnp.where(context.mask, 0.0, MASKED_LOGIT), axis=-1)
            weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic).astype(self.dtype)
            y, entries = jnp.einsum("bhts,bshc->bthc", weights, v), None
        else:
            turned = rotate_queries(
                jnp.einsum("bthc,dhc->bthd", q_position, kernel, preferred_element_type=jnp.float32), context.queries
            )
            scores = jnp.einsum("bthd,bsd->bhts", turned, context.keys)
            entries = (heads_first(k), heads_first(v))
            y = attend_cached(q, entries, context.cache, layer, context.mask, scores)
        y = constrain(y, "batch", "length", "act_heads", None)
        out = Linear((*shape[1:], self.width), (*axes[1:], "embed"), num_input_axes=2, dtype=self.dtype, name="out")
        return out(y), entries


class ConformerBlock(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)).

    Attributes: as RelativeAttention, and mlp_dim: hidden size of the MLP; dropout is of both branches too.
    """

    width: int
    num_heads: int
    mlp_dim: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""] | None, deterministic: bool, context: RelativeContext
    ) -> tuple[Float[Array, "B T D"], KeysValues | None]:
        """Returns (x, of a step its keys and values): the call shape of `cv2jax.nn.stack.apply_stack`."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        attention = RelativeAttention(self.width, self.num_heads, self.dropout, self.dtype, name="attention")
        h = LayerNorm(_NORM_EPSILON, name="attention_norm")(x)
        y, entries = attention(h, layer, context, deterministic=deterministic)
        x = x + drop(y)
        h = LayerNorm(_NORM_EPSILON, name="mlp_norm")(x)
        h = Linear((self.width, self.mlp_dim), ("embed", "mlp"), dtype=self.dtype, name="up")(h)
        h = drop(constrain(jax.nn.silu(h), "batch", "length", "act_mlp"))
        x = x + drop(Linear((self.mlp_dim, self.width), ("mlp", "embed"), dtype=self.dtype, name="down")(h))
        return constrain(x, "batch", "length", "act_embed"), entries
