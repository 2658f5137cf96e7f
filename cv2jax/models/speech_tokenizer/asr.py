"""The recognition half that teaches the tokenizer: attention decoder, CTC decoding and their losses.

Sizes and losses after SenseVoice-Large (spec/frontends.md 1.8): Whisper-like text decoder, cross-entropy with label smoothing.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.nn.attention import attend
from cv2jax.nn.layers import Embedding, FeedForward, LayerNorm, Linear, partitioned
from cv2jax.nn.masks import causal_mask, key_mask, length_mask
from cv2jax.nn.stack import apply_stack
from cv2jax.parallel.sharding import constrain

PAD_ID, SOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2, 3  # PAD_ID doubles as the CTC blank; characters start at 4
FIRST_CHARACTER_ID = 4


class DecoderBlock(nn.Module):
    """Pre-norm transformer decoder block: causal self-attention, attention to the speech, MLP.

    The cache of a block is a plain dict: `k`, `v` [B, P, H, C] filled up to `position`, and `cross_k`, `cross_v`
    [B, L, H, C], which the first step computes from the memory and later steps reuse.

    Attributes:
      width: D. num_heads: H. mlp_ratio: hidden MLP size / D. dropout: rate on each branch. dtype: computation dtype.
    """

    width: int
    num_heads: int
    mlp_ratio: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: dict[str, Array] | None,
        deterministic: bool,
        memory: Float[Array, "B L D"],
        memory_mask: Bool[Array, "B L"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        """Returns (x, cache); without a cache the whole text is seen at once under a causal mask."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        h = LayerNorm(name="self_norm")(x)
        q, k, v = self._project("self_query", h), self._project("self_key", h), self._project("self_value", h)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, position, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, position, axis=1)
            cache = cache | {"k": k, "v": v}
        mask = causal_mask(x.shape[1], k.shape[1], position)
        x = x + drop(self._merge("self_out", attend(q, k, v, mask=mask)))

        q = self._project("cross_query", LayerNorm(name="cross_norm")(x))
        if cache is not None and "cross_k" in cache:
            k, v = cache["cross_k"], cache["cross_v"]
        else:
            k, v = self._project("cross_key", memory), self._project("cross_value", memory)
            if cache is not None:
                cache = cache | {"cross_k": k, "cross_v": v}
        x = x + drop(self._merge("cross_out", attend(q, k, v, mask=key_mask(memory_mask))))

        mlp = FeedForward(self.width, self.mlp_ratio * self.width, dtype=self.dtype, name="mlp")
        x = x + drop(mlp(LayerNorm(name="mlp_norm")(x)))
        return constrain(x, "batch", "length", "act_embed"), cache

    def _project(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T H C"]:
        shape = (self.width, self.num_heads, self.width // self.num_heads)
        linear = Linear(
            shape, ("embed", "heads", "head_dim"), use_bias=not name.endswith("key"), dtype=self.dtype, name=name
        )
        return constrain(linear(x), "batch", "length", "act_heads", None)

    def _merge(self, name: str, x: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        shape, axes = (self.num_heads, self.width // self.num_heads, self.width), ("heads", "head_dim", "embed")
        return Linear(shape, axes, num_input_axes=2, dtype=self.dtype, name=name)(x)


class TextDecoder(nn.Module):
    """Autoregressive character decoder over the speech memory, with learned positions and tied output.

    Attributes: as DecoderBlock, and vocabulary_size V (special ids 0..3 included), max_text_tokens (longest text; one
      more position holds sos), num_layers, remat and scan (see `apply_stack`).
    """

    vocabulary_size: int
    max_text_tokens: int
    width: int
    num_heads: int
    num_layers: int
    mlp_ratio: int
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        memory: Float[Array, "B L D"],
        memory_mask: Bool[Array, "B L"],
        *,
        deterministic: bool,
        cache: PyTree = None,
        position: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T V"], PyTree]:
        """Returns (fp32 logits of the token after each input token, cache); `position` is that of the first input."""
        embedding = Embedding(self.vocabulary_size, self.width, dtype=self.dtype, name="embedding")
        init = partitioned(nn.initializers.normal(0.02), (None, "embed"))
        positions = self.param("positions", init, (self.max_text_tokens + 1, self.width)).astype(self.dtype)
        position = jnp.asarray(position, jnp.int32)
        x = embedding(tokens) + jax.lax.dynamic_slice_in_dim(positions, position, tokens.shape[1])
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        fields = {
            "width": self.width,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        options = {"num_layers": self.num_layers, "remat": self.remat, "scan": self.scan}
        shared = (memory.astype(self.dtype), memory_mask, position)
        x, cache = apply_stack(DecoderBlock, fields, x, cache, *shared, deterministic=deterministic, **options)
        return embedding.logits(LayerNorm(name="final_norm")(x)), cache

    def init_cache(self, batch_size: int) -> dict[str, Float[Array, "N B P H C"]]:
        """Empty self-attention caches of all layers for sos and `max_text_tokens` tokens."""
        shape = (batch_size, self.max_text_tokens + 1, self.num_heads, self.width // self.num_heads)
        zeros = jnp.zeros((self.num_layers, *shape), self.dtype)
        return {"k": zeros, "v": zeros}


def teacher_forcing(
    text_tokens: Int[Array, "B T"], num_text_tokens: Int[Array, " B"]
) -> tuple[Int[Array, "B P"], Int[Array, "B P"], Bool[Array, "B P"]]:
    """Decoder inputs [sos, text…], targets [text…, eos] and the mask of the targets that count, all [B, T+1].

    A row without text has no target at all, not even eos: an unknown transcript must not teach silence.
    """
    valid = length_mask(num_text_tokens, text_tokens.shape[1])
    text = jnp.where(valid, text_tokens, PAD_ID)
    inputs = jnp.pad(text, ((0, 0), (1, 0)), constant_values=SOS_ID)
    size = text_tokens.shape[1] + 1
    targets = jnp.where(jnp.arange(size) == num_text_tokens[:, None], EOS_ID, jnp.pad(text, ((0, 0), (0, 1))))
    mask = length_mask(num_text_tokens + 1, size) & (num_text_tokens > 0)[:, None]
    return inputs, targets, mask


def smoothed_cross_entropy(
    logits: Float[Array, "B P V"], targets: Int[Array, "B P"], smoothing: float
) -> Float[Array, "B P"]:
    """Cross-entropy against 1-ε on the target and ε/(V-1) on each other token (FunASR's smoothing), fp32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    rest = jnp.sum(log_probs, axis=-1) - target
    return -(1.0 - smoothing) * target - smoothing / (logits.shape[-1] - 1) * rest


def ctc_feasible(
    num_speech_tokens: Int[Array, " B"], text_tokens: Int[Array, "B T"], num_text_tokens: Int[Array, " B"]
) -> Bool[Array, " B"]:
    """True where the text fits: CTC needs a frame for each token and one more between equal neighbours."""
    valid = length_mask(num_text_tokens, text_tokens.shape[1])
    repeats = jnp.sum((text_tokens[:, 1:] == text_tokens[:, :-1]) & valid[:, 1:], axis=1)
    return (num_text_tokens > 0) & (num_speech_tokens >= num_text_tokens + repeats)


def ctc_loss(
    logits: Float[Array, "B L V"],
    num_speech_tokens: Int[Array, " B"],
    text_tokens: Int[Array, "B T"],
    num_text_tokens: Int[Array, " B"],
) -> Float[Array, " B"]:
    """Negative log-likelihood of each row's text, 0 for rows without text or too short for it."""
    speech_padding = 1.0 - length_mask(num_speech_tokens, logits.shape[1]).astype(jnp.float32)
    text_padding = 1.0 - length_mask(num_text_tokens, text_tokens.shape[1]).astype(jnp.float32)
    loss = optax.ctc_loss(logits.astype(jnp.float32), speech_padding, text_tokens, text_padding, blank_id=PAD_ID)
    return jnp.where(ctc_feasible(num_speech_tokens, text_tokens, num_text_tokens), loss, 0.0)


def ctc_greedy(
    logits: Float[Array, "B L V"], num_speech_tokens: Int[Array, " B"]
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Best-path CTC decoding: argmax, drop repeats, drop blanks; tokens packed to the left, padded with 0, and their number."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1]
    keep = (best != PAD_ID) & (best != before) & length_mask(num_speech_tokens, best.shape[1])
    order = jnp.argsort(~keep, axis=1, stable=True)
    num_tokens = jnp.sum(keep, axis=1, dtype=jnp.int32)
    tokens = jnp.take_along_axis(jnp.where(keep, best, PAD_ID), order, axis=1)
    return tokens, num_tokens
