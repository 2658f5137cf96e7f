"""The text-speech language model: three embedding tables, a Qwen2 backbone, a head over speech tokens (paper 2.3).

One row of input is a sequence of (token, kind): the kind says which table embeds it. Ported: spec/official.md 3.1 and 3.3.
"""

import dataclasses
import typing
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from cv2jax.config import UserError
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Backbone, Qwen2Config
from cv2jax.models.text_speech_lm.sequence import IGNORE, NUM_SPECIAL, NUM_STOPS, SPECIAL, SPEECH, TEXT
from cv2jax.nn.layers import Axes, partitioned


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpeechLmConfig:
    """Sizes of the language model; the defaults are CosyVoice 2's."""

    backbone: Qwen2Config = dataclasses.field(default_factory=Qwen2Config)
    num_speech_tokens: int = 6561  # S: the size of the speech tokenizer's codebook

    @property
    def num_outputs(self) -> int:
        """Classes of the head, and rows of the speech table: speech tokens and stops."""
        return self.num_speech_tokens + NUM_STOPS

    def validate(self) -> None:
        """Raises UserError for a codebook without codes; the backbone validates itself."""
        if self.num_speech_tokens < 1:
            raise UserError(f"model.num_speech_tokens={self.num_speech_tokens}: must be positive")


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class TextSpeechLmOutput:
    """What a forward gives."""

    logits: Float[Array, "B T V"]  # fp32, of what follows each input token
    hidden: Float[Array, "B T D"]  # the backbone's output, in the computation dtype
    cache: PyTree  # as given, with this call's keys and values; None without one


class TextSpeechLm(nn.Module):
    """Embeds, runs the backbone, and scores the next speech token; with the parameters special_embedding,
    text_embedding, speech_embedding, backbone, head.

    Attributes:
      config: sizes. impl: of `cv2jax.nn.attention.attend`.
    """

    config: TextSpeechLmConfig
    impl: str = "xla"

    def setup(self) -> None:
        c = self.config
        unit = nn.initializers.normal(1.0)  # torch's nn.Embedding, as upstream
        self.special_embedding = self._table(
            "special_embedding", (NUM_SPECIAL, c.backbone.width), (None, "embed"), unit
        )
        axes: Axes = ("vocab", "embed")
        text, speech = (c.backbone.vocabulary_size, c.backbone.width), (c.num_outputs, c.backbone.width)
        self.text_embedding = self._table("text_embedding", text, axes, nn.initializers.normal(0.02))
        self.speech_embedding = self._table("speech_embedding", speech, axes, unit)
        self.backbone = Qwen2Backbone(c.backbone, impl=self.impl)
        uniform = _uniform_within(c.backbone.width**-0.5)  # torch's nn.Linear: kernel and bias within 1/√D
        self.head_kernel = self._table("head_kernel", (c.backbone.width, c.num_outputs), ("embed", "vocab"), uniform)
        self.head_bias = self._table("head_bias", (c.num_outputs,), ("vocab",), uniform)

    def _table(self, name: str, shape: tuple[int, ...], axes: Axes, init: jax.nn.initializers.Initializer) -> Array:
        return self.param(name, partitioned(init, axes), shape, jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        kinds: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B 1 #T S"],
        *,
        cache: PyTree = None,
        start: Int[Array, " B"] | None = None,
    ) -> TextSpeechLmOutput:
        """Arguments as `Qwen2Backbone`, with tokens and their kinds (SPECIAL, TEXT, SPEECH) for embeddings."""
        x = self.embed(tokens, kinds)
        hidden, cache = self.backbone(x, positions, mask, cache=cache, start=start)
        return TextSpeechLmOutput(logits=self.logits(hidden), hidden=hidden, cache=cache)

    def embed(self, tokens: Int[Array, "B T"], kinds: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks each token up in the table of its kind."""
        dtype = self.config.backbone.dtype
        x = jnp.zeros((*tokens.shape, self.config.backbone.width), dtype)
        for kind, table in (
            (SPECIAL, self.special_embedding),
            (TEXT, self.text_embedding),
            (SPEECH, self.speech_embedding),
        ):
            inside = kinds == kind
            x = x + jnp.where(inside[..., None], table.astype(dtype)[jnp.where(inside, tokens, 0)], 0)
        return x

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the speech tokens and stops, fp32."""
        kernel = self.head_kernel.astype(self.config.backbone.dtype)
        return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32) + self.head_bias


def _uniform_within(bound: float) -> jax.nn.initializers.Initializer:
    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def init_params(config: TextSpeechLmConfig, key: Key[Array, ""]) -> PyTree:
    """fp32 parameters boxed with logical axes; trace it with `jax.eval_shape` for shapes only."""
    zeros, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1, 1), bool)
    return TextSpeechLm(config).init(key, zeros, zeros, zeros, mask)["params"]


def next_token_loss(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood over the targets that are not IGNORE, and metrics `loss accuracy num_targets`.

    The mean is over the whole batch, so that every target weighs the same (spec/official.md 3.3). 0 without any target.
    """
    counts = targets != IGNORE
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    num_targets = jnp.sum(counts)
    total = jnp.maximum(num_targets, 1)
    loss = -jnp.sum(jnp.where(counts, chosen, 0)) / total
    right = jnp.sum(counts & (jnp.argmax(logits, axis=-1) == targets))
    return loss, {"loss": loss, "accuracy": right / total, "num_targets": num_targets}
