"""The compiled functions of the vocoder: whole utterances, and steps of streams, which are late by `hold_back(config)`.

That is 9,480 samples at the official size, 395 ms: so far the first convolutions and the F0 predictor look ahead.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import UserError
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import HiftOutput, HiftState, HiftVocoder


def init_state(config: HiftVocoderConfig, num_rows: int) -> HiftState:
    """The state of streams of which nothing was heard."""
    num_frames, tails = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), _state_shapes(config, num_rows))
    return HiftState(num_frames=num_frames, tails=tails)


@functools.lru_cache(maxsize=16)  # it traces the model, which a request must not wait for
def _state_shapes(config: HiftVocoderConfig, num_rows: int) -> tuple[Any, list[Any]]:
    vocoder = HiftVocoder(config)
    mel = jax.ShapeDtypeStruct((num_rows, 1, config.num_mels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
    count = jax.ShapeDtypeStruct((num_rows,), jnp.int32)

    def first(key: Array, mel: Array, keys: Array, count: Array) -> tuple[Any, list[Any]]:
        (_, state), _ = vocoder.init_with_output(key, mel, keys, None, count, count, method="step")
        return state.num_frames, state.tails

    return jax.eval_shape(first, jax.eval_shape(lambda: jax.random.key(0)), mel, keys, count)


@functools.partial(jax.jit, static_argnums=0)
def step(
    config: HiftVocoderConfig,
    params: Any,
    state: HiftState,
    mel: Float[Array, "B F M"],
    keys: Key[Array, " B"],
    num_valid: Int[Array, " B"],
    total: Int[Array, " B"],
) -> tuple[HiftOutput, HiftState]:
    """`HiftVocoder.step` of a batch of streams that may stand anywhere."""
    arguments = (mel, keys, state, num_valid, total)
    return HiftVocoder(config).apply({"params": params}, *arguments, method="step")  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=0)
def whole(
    config: HiftVocoderConfig,
    params: Any,
    mel: Float[Array, "B F M"],
    keys: Key[Array, " B"],
    num_frames: Int[Array, " B"],
) -> HiftOutput:
    """`HiftVocoder.__call__` of whole utterances."""
    return HiftVocoder(config).apply({"params": params}, mel, keys, num_frames)  # type: ignore[return-value]


def require_mel(config: HiftVocoderConfig, definition: MelDefinition) -> None:
    """Raises UserError unless the vocoder was made for mel of that definition."""
    lines = [
        f"{name} {theirs:g} (the vocoder's: {mine:g})"
        for name, theirs in vars(definition).items()
        if theirs != (mine := getattr(config, name))
    ]
    if lines:
        raise UserError(f"mel of another definition: {', '.join(lines)}; use the vocoder that was trained on it")
