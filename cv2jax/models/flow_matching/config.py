"""Sizes of the flow-matching model, and what it is trained with (spec/official.md 4)."""

import dataclasses
from typing import Literal

from cv2jax.config import UserError
from cv2jax.nn.masks import NO_CHUNK, ChunkMask
from cv2jax.nn.stack import REMAT_POLICIES

FRAMES_PER_TOKEN = 2  # 25 Hz tokens, 50 Hz frames
DRAWN_PROMPT = -1  # of a mask: the prompt that training draws stays visible
LOOKAHEAD = 3  # tokens behind the last one of a hop that the encoder looks at


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowEncoderConfig:
    """Speech tokens to one vector a mel frame: conformer blocks at 25 Hz, then at 50 Hz."""

    width: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    num_layers: int = 6
    num_upsampled_layers: int = 4
    dropout: float = 0.1

    def validate(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        _positive("model.encoder", self, "width num_heads mlp_dim num_layers num_upsampled_layers")
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"model.encoder.width={self.width}: must be a multiple of twice model.encoder.num_heads={self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.encoder.dropout={self.dropout}: must lie in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The velocity network: a causal UNet of one level, each stage a residual convolution block and transformer blocks."""

    width: int = 256
    num_blocks: int = 4  # transformer blocks of a stage
    num_mid_stages: int = 12
    num_heads: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4

    def validate(self) -> None:
        """Raises UserError for sizes that are not positive."""
        _positive("model.estimator", self, " ".join(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """The whole model, how it is trained and which masks it is trained for.

    A mask is (chunk, left context, prompt) in tokens: what lies in a query's own chunk and before it is seen, without a
    left context as far back as there is; with one, that many tokens before the chunk, and the first `prompt` always.
    """

    num_speech_tokens: int = 6561
    num_mels: int = 80
    speaker_dim: int = 192
    encoder: FlowEncoderConfig = FlowEncoderConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    # Training draws one of them an utterance. Chunk 0 sees everything, a left context of -1 has no end, a prompt of -1 is
    # the one that is drawn with the utterance (kernels need a number).
    mask_chunks: tuple[int, ...] = (0, 1, 25, 50)
    mask_lefts: tuple[int, ...] = (-1, -1, -1, -1)
    mask_prompts: tuple[int, ...] = (0, 0, 0, 0)
    mask_per: Literal["utterance", "batch"] = "utterance"
    loss: Literal["l1", "mse"] = "l1"  # of the paper, of the official code
    # Of the distance between the mel and the sum of encoded tokens and speaker, beside the loss: much as Matcha-TTS's prior
    # loss. These parts then learn the mean mel in a few hundred steps. 0: none, as official.
    prior_weight: float = 0.0
    sigma_min: float = 1e-6
    guidance: float = 0.7  # classifier-free: (1 + g) · conditioned − g · unconditioned
    temperature: float = 1.0  # of the noise that the solver starts from; less: nearer to the mean of what could be said
    condition_dropout: float = 0.2
    prompt_share: float = 0.3  # of an utterance's frames are given as a prompt, at most
    no_prompt: float = 0.5  # share of utterances without one
    num_steps: int = 10  # of Euler's method
    # Codes that share FSQ digits start out alike and move fast, which a small corpus needs; or unit normal, as official.
    token_init: Literal["digits", "official"] = "digits"
    attention: Literal["auto", "xla", "splash"] = "auto"  # of the estimator
    remat: str = "none"
    scan_layers: bool = True
    dtype: str = "float32"

    def validate(self) -> None:
        """Raises UserError for what cannot be built or trained."""
        _positive("model", self, "num_speech_tokens num_mels speaker_dim sigma_min num_steps")
        for name in ("condition_dropout", "prompt_share", "no_prompt"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"model.{name}={getattr(self, name)}: must lie in 0 … 1")
        for name in ("guidance", "temperature", "prior_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must not be negative")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat}: choose one of {', '.join(REMAT_POLICIES)}")
        counts = {len(self.mask_chunks), len(self.mask_lefts), len(self.mask_prompts)}
        if counts != {len(self.mask_chunks)} or not self.mask_chunks:
            raise UserError("model.mask_chunks, mask_lefts, mask_prompts: give as many of each, one or more")
        for name, least in (("mask_chunks", 0), ("mask_lefts", -1), ("mask_prompts", DRAWN_PROMPT)):
            if min(getattr(self, name)) < least:
                raise UserError(f"model.{name}={getattr(self, name)}: must be {least} or more")

    @property
    def masks(self) -> tuple[ChunkMask, ...]:
        """The masks of training, in tokens."""
        rows = zip(self.mask_chunks, self.mask_lefts, self.mask_prompts, strict=True)
        return tuple(
            ChunkMask(chunk=chunk or NO_CHUNK, left=None if left < 0 else left, prompt=max(prompt, 0))
            for chunk, left, prompt in rows
        )


def _positive(place: str, config: object, names: str) -> None:
    for name in names.split():
        if getattr(config, name) <= 0:
            raise UserError(f"{place}.{name}={getattr(config, name)}: must be positive")
