"""The flow-matching model: its parts, its loss on given draws, and the solve of whole sequences.

`step.py` solves the same in hops. Mel is log-mel [B F M] at 50 Hz, F = 2·L frames for L speech tokens; prompts stand in
front, and everything counts from their start.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from cv2jax.models.flow_matching.cfm import masked_mean, on_path, solve_euler, velocity_error, with_unconditioned
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.draws import FlowDraws
from cv2jax.models.flow_matching.encoder import FlowEncoder
from cv2jax.models.flow_matching.estimator import Estimator
from cv2jax.nn.layers import Linear
from cv2jax.nn.masks import MaskSpec, length_mask


class FlowMatching(nn.Module):
    """Encoder, projections and velocity network under one tree of parameters.

    Attributes:
      config: sizes. impl: of `attend`, in the velocity network. masks_padding: as in `FlowEncoder`.
    """

    config: FlowMatchingConfig
    impl: str = "xla"
    masks_padding: bool = True

    def setup(self) -> None:
        c = self.config
        self.encoder = FlowEncoder(c, masks_padding=self.masks_padding)
        self.encoder_out = Linear((c.encoder.width, c.num_mels), ("embed", None), dtype=c.dtype)
        self.speaker = Linear((c.speaker_dim, c.num_mels), (None, None), dtype=c.dtype)
        self.estimator = Estimator(c, impl=self.impl)

    def encode(self, *args: Any, **kwargs: Any) -> tuple[Float[Array, "B F M"], Any]:
        """(mu, encoder state) of the arguments of `FlowEncoder`."""
        encoded, state = self.encoder(*args, **kwargs)
        return self.encoder_out(encoded), state

    def condition(self, speaker_embedding: Float[Array, "B E"]) -> Float[Array, "B M"]:
        """The speaker as the velocity network is told: of the embedding at length 1."""
        norm = jnp.linalg.norm(speaker_embedding, axis=-1, keepdims=True)
        return self.speaker(speaker_embedding / jnp.maximum(norm, 1e-12))

    def velocity(self, *args: Any, **kwargs: Any) -> tuple[Float[Array, "B F M"], Any, Any]:
        """As `Estimator`."""
        return self.estimator(*args, **kwargs)

    def __call__(self, speaker_embedding: Float[Array, "B E"], encode: Any, velocity: Any) -> None:
        """Calls every part once: for `init_params`."""
        mu, _ = self.encode(*encode)
        self.velocity(mu, velocity, mu, self.condition(speaker_embedding), mu, MaskSpec())


def init_params(config: FlowMatchingConfig, key: Key[Array, ""]) -> PyTree:
    """Fresh parameters, boxed with logical axes."""
    one, mask = jnp.ones((1,), jnp.int32), jnp.ones((1, 1, 1, 1), bool)
    frame_mask = jnp.ones((1, 1, FRAMES_PER_TOKEN, FRAMES_PER_TOKEN), bool)
    tokens = jnp.zeros((1, 1 + LOOKAHEAD), jnp.int32)
    encode = (tokens, one, 0 * one, (mask, frame_mask))
    embedding = jnp.ones((1, config.speaker_dim))
    return FlowMatching(config).init(key, embedding, encode, jnp.zeros((1,)))["params"]


def flow_loss(
    model: FlowMatching,
    params: PyTree,
    batch: dict[str, Array],
    draws: FlowDraws,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B F"]]:
    """(loss, error [B F] of every frame): of the velocity at a place on the path from noise to mel (paper eq. 8).

    With `prior_weight` the loss also asks for the mel as the sum of encoded tokens and speaker; the error does not.

    Args:
      batch: `speech_tokens` [B L], `num_tokens` [B], `mel` [B F M], `speaker_embedding` [B E]. What lies behind
        `num_tokens`, or 2·`num_tokens` frames, changes nothing.
      dropout_key: None: no dropout.
    """
    c, num_tokens = model.config, batch["num_tokens"]
    frame_mask = length_mask(num_tokens * FRAMES_PER_TOKEN, batch["mel"].shape[1])
    mel = jnp.where(frame_mask[..., None], batch["mel"], 0)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    masks = padded_masks(draws.mask, num_tokens, batch["speech_tokens"].shape[1])

    def apply(module: FlowMatching) -> tuple[Array, Array, Array]:
        mu, speaker = _conditions(module, batch, num_tokens, masks, deterministic=dropout_key is None)
        is_prompt = jnp.arange(mel.shape[1]) < draws.num_prompt[:, None]
        keep = draws.is_conditioned
        place, wanted = on_path(draws.noise, mel, draws.time, c.sigma_min)
        velocity, _, _ = module.velocity(
            place,
            draws.time,
            jnp.where(keep[:, None, None], mu, 0),
            jnp.where(keep[:, None], speaker, 0),
            jnp.where((is_prompt & keep[:, None])[..., None], mel, 0),
            masks[1],
        )
        return mu + speaker[:, None], velocity, wanted

    prior, velocity, wanted = nn.apply(apply, model)({"params": params}, rngs=rngs)
    error = velocity_error(velocity, wanted, c.loss)
    loss = masked_mean(error, frame_mask)
    if c.prior_weight:
        loss = loss + c.prior_weight * masked_mean(velocity_error(prior, mel, c.loss), frame_mask)
    return loss, error


def padded_masks(mask: MaskSpec, num_tokens: Int[Array, " B"], length: int) -> tuple[MaskSpec, MaskSpec]:
    """`mask` over tokens and over frames, the padding behind `num_tokens` a segment of its own."""
    frames = mask.scaled(FRAMES_PER_TOKEN)
    segments = lambda n, size: length_mask(n, size).astype(jnp.int32)  # noqa: E731
    return (
        dataclasses.replace(mask, segments=segments(num_tokens, length)),
        dataclasses.replace(frames, segments=segments(num_tokens * FRAMES_PER_TOKEN, length * FRAMES_PER_TOKEN)),
    )


def _conditions(
    module: FlowMatching,
    batch: dict[str, Array],
    num_tokens: Int[Array, " B"],
    masks: tuple[MaskSpec, MaskSpec],
    *,
    deterministic: bool,
) -> tuple[Float[Array, "B F M"], Float[Array, "B M"]]:
    tokens = batch["speech_tokens"]
    length = tokens.shape[1]
    arrays = tuple(m.array(size, size) for m, size in zip(masks, (length, FRAMES_PER_TOKEN * length), strict=True))
    ahead = jnp.pad(tokens, ((0, 0), (0, LOOKAHEAD)))
    num_lookahead = batch.get("num_lookahead", jnp.zeros_like(num_tokens))
    mu, _ = module.encode(ahead, num_tokens, num_lookahead, arrays, deterministic=deterministic)
    return mu, module.condition(batch["speaker_embedding"])


def solve(
    model: FlowMatching,
    params: PyTree,
    batch: dict[str, Array],
    noise: Float[Array, "B F M"],
    mask: MaskSpec,
) -> Float[Array, "B F M"]:
    """The mel of whole sequences, prompts included, by Euler's method with classifier-free guidance; one program.

    Args:
      batch: `speech_tokens` [B L] and `num_tokens` [B], prompts in front; `prompt_mel` [B F M], 0 behind the prompt;
        `speaker_embedding` [B E]; and, of an utterance that is not complete, `num_lookahead` [B] (0 … 3): tokens that
        follow the `num_tokens` and are only looked at.
      noise: where the frames start, times the temperature. mask: who sees whom, in tokens, without segments.

    What lies behind a row's frames is 0, and rows do not depend on each other.
    """
    c, num_tokens = model.config, batch["num_tokens"]
    if len(num_tokens) % max(len(mask.rows), 1):
        mask = mask.as_data(len(num_tokens))  # the unconditioned rows behind would be dealt other masks
    masks = padded_masks(mask, num_tokens, batch["speech_tokens"].shape[1])
    frame_mask = length_mask(num_tokens * FRAMES_PER_TOKEN, noise.shape[1])[..., None]
    mu, speaker = nn.apply(lambda module: _conditions(module, batch, num_tokens, masks, deterministic=True), model)(
        {"params": params}
    )
    conditions = [with_unconditioned(x) for x in (mu, speaker, batch["prompt_mel"])]
    pair_mask = jax.tree.map(lambda x: jnp.concatenate([x, x]), masks[1])

    def velocity(x: Array, time: Array, *_: None) -> tuple[Array, None, None]:
        applied: Any = model.apply({"params": params}, x, time, *conditions, pair_mask, method="velocity")
        return applied[0], None, None

    start = jnp.where(frame_mask, c.temperature * noise, 0)
    mel, *_ = solve_euler(velocity, start, num_steps=c.num_steps, guidance=c.guidance)
    return jnp.where(frame_mask, mel, 0)
