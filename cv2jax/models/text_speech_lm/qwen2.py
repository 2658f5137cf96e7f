"""The Qwen2 decoder as the backbone of the text-speech language model: hidden states in and out, no text head at all.

Ported maths: Hugging Face `Qwen2Model` (spec/official.md 3.2). The text head of the original is never built: its 151,936
logits a position are a quarter of the work, and nobody reads them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.config import UserError
from cv2jax.nn.attention import attend
from cv2jax.nn.layers import GatedFeedForward, Linear, RmsNorm
from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.rope import apply_rope, rope_angles
from cv2jax.nn.stack import REMAT_POLICIES, apply_stack
from cv2jax.parallel.sharding import constrain

# Keys of a Hugging Face config.json and our fields.
HF_FIELDS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_epsilon",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Sizes of a Qwen2 or Qwen2.5 decoder; the defaults are those of Qwen2.5-0.5B, the backbone of CosyVoice 2."""

    vocabulary_size: int = 151_936  # text tokens; the training task takes 0 for as many as the corpus has
    width: int = 896
    mlp_dim: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    remat: str = "none"  # a policy of cv2jax/nn/stack.py
    scan_layers: bool = True
    dtype: str = "float32"  # of activations; parameters stay fp32

    @property
    def head_dim(self) -> int:
        """C, the size of a head."""
        return self.width // self.num_heads

    def validate(self) -> None:
        """Raises UserError, naming the field, its value and the mend, for sizes that cannot work."""
        self._require(self.vocabulary_size >= 0, "vocabulary_size", "must not be negative")
        for name in ("width", "mlp_dim", "num_layers", "num_heads", "num_kv_heads"):
            self._require(getattr(self, name) > 0, name, "must be positive")
        self._require(self.width % self.num_heads == 0, "width", f"must be a multiple of num_heads={self.num_heads}")
        self._require(
            self.head_dim % 2 == 0, "width", f"width/num_heads={self.head_dim} must be even: rotary positions"
        )
        divides = self.num_heads % self.num_kv_heads == 0
        self._require(divides, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        for name in ("rope_theta", "norm_epsilon"):
            self._require(getattr(self, name) > 0, name, "must be positive")
        self._require(self.remat in REMAT_POLICIES, "remat", f"choose one of {', '.join(sorted(REMAT_POLICIES))}")
        self._require(self.dtype in ("float32", "bfloat16"), "dtype", "choose float32 or bfloat16")

    def _require(self, condition: bool, name: str, mend: str) -> None:
        if not condition:
            raise UserError(f"model.backbone.{name}={getattr(self, name)!r}: {mend}")


def config_from_hf(values: Mapping[str, Any], place: str) -> Qwen2Config:
    """The config of a Hugging Face config.json (parsed); UserError, naming `place`, for another or unsupported model.

    transformers 5 keeps `rope_theta` inside `rope_parameters`; both spellings are read.
    """
    kind = values.get("model_type")
    if kind != "qwen2":
        raise UserError(f"{place}: model_type is {kind!r}; only 'qwen2' (Qwen2, Qwen2.5) is supported")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{place}: scaled rotary positions ({rope}) are not supported; use a model without them")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{place}: hidden_act is {values['hidden_act']!r}; Qwen2 has 'silu'")
    if values.get("use_sliding_window"):
        raise UserError(f"{place}: use_sliding_window is on; only full attention is supported")
    defaults = {"rope_theta": rope.get("rope_theta", 1e6), "rms_norm_eps": 1e-6}
    values = {**defaults, **values}
    missing = [key for key in HF_FIELDS if key not in values]
    if missing:
        raise UserError(f"{place}: lacks {', '.join(missing)}")
    sizes: dict[str, Any] = {ours: values[theirs] for theirs, ours in HF_FIELDS.items()}
    config = Qwen2Config(**sizes)
    config.validate()
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{place}: head_dim is {values['head_dim']}; only hidden_size / heads is supported")
    return config


class Qwen2Attention(nn.Module):
    """Rotary self-attention with grouped key/value heads; query, key and value have biases, the output has none.

    The cache is a plain dict `k`, `v` [B, S, K, C]; row b's new entries are written from position `start[b]` on.

    Attributes:
      config: sizes. impl: of `attend`.
    """

    config: Qwen2Config
    impl: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: dict[str, Array] | None,
        mask: Bool[Array, "#B 1 #T S"] | MaskSpec,
        angles: Float[Array, "B T C_half"],
        start: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        """Attends over the True keys of mask: those of x, or with a cache those of the cache that now holds x too."""
        c = self.config
        q = apply_rope(self._project("query", c.num_heads, x), angles)
        k = apply_rope(self._project("key", c.num_kv_heads, x), angles)
        v = self._project("value", c.num_kv_heads, x)
        if cache is not None:
            if start is None:
                raise ValueError("a cache needs `start`, the position of each row's first new entry")
            k, v = _write(cache["k"], k, start), _write(cache["v"], v, start)
            cache = {"k": k, "v": v}
        y = attend(q, k, v, mask=mask, impl=self.impl)
        shape, axes = (c.num_heads, c.head_dim, c.width), ("heads", "head_dim", "embed")
        return Linear(shape, axes, num_input_axes=2, use_bias=False, dtype=c.dtype, name="out")(y), cache

    def _project(self, name: str, num_heads: int, x: Float[Array, "B T D"]) -> Float[Array, "B T H C"]:
        c = self.config
        shape = (c.width, num_heads, c.head_dim)
        projected = Linear(shape, ("embed", "heads", "head_dim"), dtype=c.dtype, name=name)(x)
        return constrain(projected, "batch", "length", "act_heads", None)


def _write(
    cache: Float[Array, "B S K C"], new: Float[Array, "B T K C"], start: Int[Array, " B"]
) -> Float[Array, "B S K C"]:
    """Writes each row's T new entries from its own position on; what would lie behind the end is dropped.

    (A dynamic_update_slice would move the whole block forward until it fits, onto entries that count.)
    """
    places = start[:, None] + jnp.arange(new.shape[1])
    write_row = lambda row, values, at: row.at[at].set(values, mode="drop", unique_indices=True)  # noqa: E731
    return jax.vmap(write_row)(cache, new.astype(cache.dtype), places)


class Qwen2Block(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)).

    Attributes: as Qwen2Attention.
    """

    config: Qwen2Config
    impl: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: dict[str, Array] | None,
        deterministic: bool,
        mask: Bool[Array, "#B 1 #T S"] | MaskSpec,
        angles: Float[Array, "B T C_half"],
        start: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        """Returns (x, cache): the call shape of `cv2jax.nn.stack.apply_stack`; there is no dropout."""
        c = self.config
        h = RmsNorm(c.norm_epsilon, name="attention_norm")(x)
        y, cache = Qwen2Attention(c, impl=self.impl, name="attention")(h, cache, mask, angles, start)
        x = x + y
        mlp = GatedFeedForward(c.width, c.mlp_dim, dtype=c.dtype, name="mlp")
        x = x + mlp(RmsNorm(c.norm_epsilon, name="mlp_norm")(x))
        return constrain(x, "batch", "length", "act_embed"), cache


class Qwen2Backbone(nn.Module):
    """All blocks and the final norm, over embeddings.

    Attributes: as Qwen2Attention.
    """

    config: Qwen2Config
    impl: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B 1 #T S"] | MaskSpec,
        *,
        cache: PyTree = None,
        start: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """Returns (the final norm's output, cache).

        Args:
          x: input embeddings. positions: of each, for the rotary angles (the segments of a packed row start again at 0).
          mask: which of the S keys each query sees; S = T without a cache, else the length of the cache.
          cache: of `init_cache`. start: where in the cache each row's entries of this call go; ValueError without.
        """
        c = self.config
        angles = rope_angles(positions, c.head_dim, c.rope_theta)
        fields = {"config": c, "impl": self.impl}
        options = {"num_layers": c.num_layers, "remat": c.remat, "scan": c.scan_layers}
        shared = (mask, angles, start)
        x = x.astype(c.dtype)
        if isinstance(cache, tuple):
            layers = []
            for i, layer in enumerate(cache):
                x, layer = Qwen2Block(**fields, name=f"blocks_{i}")(x, layer, True, *shared)
                layers.append(layer)
            cache = tuple(layers)
        else:
            x, cache = apply_stack(Qwen2Block, fields, x, cache, *shared, deterministic=True, **options)
        return RmsNorm(c.norm_epsilon, name="final_norm")(x), cache


def init_cache(config: Qwen2Config, batch_size: int, length: int) -> PyTree:
    """Empty key/value caches `k`, `v` of all layers for `length` positions, in the computation dtype.

    For scanned layers one dict of arrays [N B S K C]; else a tuple of N dicts of arrays [B S K C], which a loop updates
    in place, where stacking them would copy every entry at every token.
    """
    shape = (batch_size, length, config.num_kv_heads, config.head_dim)
    if config.scan_layers:
        return {name: jnp.zeros((config.num_layers, *shape), config.dtype) for name in ("k", "v")}
    return tuple({name: jnp.zeros(shape, config.dtype) for name in ("k", "v")} for _ in range(config.num_layers))
