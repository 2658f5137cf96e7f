"""The text-speech language model: three embedding tables, a Qwen2 backbone, a head over speech tokens (paper 2.3).

One row of input is a sequence of (token, kind): the kind says which table embeds it. Ported: spec/official.md 3.1 and 3.3.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from cv2jax.config import UserError
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Backbone, Qwen2Config
from cv2jax.models.text_speech_lm.sequence import MIX_RATIO, NUM_SPECIAL, NUM_STOPS, SPECIAL, SPEECH, TEXT, Ratio
from cv2jax.nn.init import init_by_digits, num_digits, uniform_within
from cv2jax.nn.layers import Axes, partitioned
from cv2jax.nn.masks import MaskSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpeechLmConfig:
    """Sizes, layout and loss of the language model; the defaults are CosyVoice 2's."""

    backbone: Qwen2Config = dataclasses.field(default_factory=Qwen2Config)
    num_speech_tokens: int = 6561  # S: the size of the speech tokenizer's codebook
    mix_ratio: tuple[int, int] = MIX_RATIO  # N:M, text to speech tokens of a group where text arrives
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of the mean squared log-partition
    speech_noise: float = 0.0  # share of speech inputs replaced in training; see `augment.py`
    loss_chunk: int = 0  # positions of every row whose logits are held at once; 0: all of them
    speech_init: Literal["normal", "digits"] = "normal"  # "digits": codes that share FSQ digits start out alike
    text_init_scale: float = 0.02  # standard deviation of the text table, where it is not loaded
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # implementation in training

    @property
    def num_outputs(self) -> int:
        """Classes of the head, and rows of the speech table: speech tokens and stops."""
        return self.num_speech_tokens + NUM_STOPS

    @property
    def ratio(self) -> Ratio:
        """`mix_ratio` as the layout takes it."""
        return self.mix_ratio[0], self.mix_ratio[1]

    def validate(self) -> None:
        """Raises UserError, naming the field, its value and the mend; the backbone validates itself."""
        self._require(self.num_speech_tokens > 0, "num_speech_tokens", "must be positive")
        two = len(self.mix_ratio) == 2 and min(self.mix_ratio) > 0
        self._require(two, "mix_ratio", "give two positive numbers, text and speech tokens of a group")
        for name in ("label_smoothing", "speech_noise"):
            self._require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")
        for name in ("z_loss", "loss_chunk"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        self._require(self.text_init_scale > 0, "text_init_scale", "must be positive")
        self._require(self.speech_init in ("normal", "digits"), "speech_init", "choose normal or digits")
        has_digits = self.speech_init == "normal" or num_digits(self.num_speech_tokens) > 0
        self._require(
            has_digits, "speech_init", f"num_speech_tokens={self.num_speech_tokens} is no power of 3; set normal"
        )

    def _require(self, condition: bool, name: str, mend: str) -> None:
        if not condition:
            raise UserError(f"model.{name}={getattr(self, name)!r}: {mend}")


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
        uniform = uniform_within(c.backbone.width**-0.5)  # torch's nn.Linear: kernel and bias within 1/√D
        speech_init, head_init = unit, uniform
        if c.speech_init == "digits":
            digits = num_digits(c.num_speech_tokens)
            speech_init, head_init = init_by_digits(unit, digits, 0), init_by_digits(uniform, digits, 1)
        self.special_embedding = self._table(
            "special_embedding", (NUM_SPECIAL, c.backbone.width), (None, "embed"), unit
        )
        axes: Axes = ("vocab", "embed")
        text, speech = (c.backbone.vocabulary_size, c.backbone.width), (c.num_outputs, c.backbone.width)
        self.text_embedding = self._table("text_embedding", text, axes, nn.initializers.normal(c.text_init_scale))
        self.speech_embedding = self._table("speech_embedding", speech, axes, speech_init)
        self.backbone = Qwen2Backbone(c.backbone, impl=self.impl)
        self.head_kernel = self._table("head_kernel", (c.backbone.width, c.num_outputs), ("embed", "vocab"), head_init)
        self.head_bias = self._table("head_bias", (c.num_outputs,), ("vocab",), uniform)

    def _table(self, name: str, shape: tuple[int, ...], axes: Axes, init: jax.nn.initializers.Initializer) -> Array:
        return self.param(name, partitioned(init, axes), shape, jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        kinds: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B 1 #T S"] | MaskSpec,
        *,
        cache: PyTree = None,
        start: Int[Array, " B"] | None = None,
    ) -> TextSpeechLmOutput:
        """Arguments as `Qwen2Backbone`, with tokens and their kinds (SPECIAL, TEXT, SPEECH) for embeddings."""
        x = self.embed(tokens, kinds)
        hidden, cache = self.backbone(x, positions, mask, cache=cache, start=start)
        return TextSpeechLmOutput(logits=self.logits(hidden), hidden=hidden, cache=cache)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        kinds: Int[Array, "B T"],
        num_tokens: Int[Array, " B"],
        num_cached: Int[Array, " B"],
        cache: PyTree,
    ) -> tuple[Float[Array, "B V"], PyTree]:
        """Feeds the first num_tokens[b] of row b's tokens behind the num_cached[b] positions that its cache holds.

        Returns: (logits [B V] of what follows the last token fed, cache). Rows without tokens leave their cache as it is,
        and their logits mean nothing.
        """
        size = jax.tree.leaves(cache)[0].shape[-3]
        positions = num_cached[:, None] + jnp.arange(tokens.shape[1])
        mask = (jnp.arange(size) <= positions[..., None])[:, None]
        start = jnp.where(num_tokens > 0, num_cached, size)  # behind the end: written nowhere
        hidden, cache = self.backbone(self.embed(tokens, kinds), positions, mask, cache=cache, start=start)
        last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        return self.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0], cache

    def embed(self, tokens: Int[Array, "B T"], kinds: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks each token up in the table of its kind."""
        dtype = self.config.backbone.dtype
        x = jnp.zeros((*tokens.shape, self.config.backbone.width), dtype)
        for kind, table in (
            (SPECIAL, self.special_embedding),
            (TEXT, self.text_embedding),
            (SPEECH, self.speech_embedding),
        ):
            if not table.shape[0]:  # of a preset whose text vocabulary is still open
                continue
            inside = kinds == kind
            # Cast what was looked up, never the table: the text table has 151,936 rows.
            x = x + jnp.where(inside[..., None], table[jnp.where(inside, tokens, 0)].astype(dtype), 0)
        return x

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the speech tokens and stops, fp32."""
        kernel = self.head_kernel.astype(self.config.backbone.dtype)
        return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32) + self.head_bias


def apply_packed(
    config: TextSpeechLmConfig, params: PyTree, batch: Mapping[str, Int[Array, "B T"]]
) -> TextSpeechLmOutput:
    """The model on packed rows: `token kind positions segments` [B T], each segment seeing only itself, causally."""
    mask = MaskSpec(kind="causal", segments=batch["segments"])
    model = TextSpeechLm(config, impl=config.attention)
    return typing.cast(
        TextSpeechLmOutput, model.apply({"params": params}, batch["token"], batch["kind"], batch["positions"], mask)
    )


def init_params(config: TextSpeechLmConfig, key: Key[Array, ""]) -> PyTree:
    """fp32 parameters boxed with logical axes; trace it with `jax.eval_shape` for shapes only."""
    zeros, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1, 1), bool)
    return TextSpeechLm(config).init(key, zeros, zeros, zeros, mask)["params"]
