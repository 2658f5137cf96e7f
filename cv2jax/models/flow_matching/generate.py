"""Mel for speech tokens without a prompt, as evaluations and offline synthesis want it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.model import FlowMatching, solve
from cv2jax.models.flow_matching.noise import frame_noise
from cv2jax.nn.masks import NO_CHUNK, ChunkMask, MaskSpec


def generate(
    model: FlowMatching, params: PyTree, batch: dict[str, Array], keys: Key[Array, " B"], mask: ChunkMask
) -> Float[Array, "B F M"]:
    """`solve` of `speech_tokens`, `num_tokens` and `speaker_embedding` from each row's own noise, `mask` in tokens.

    Under a mask with a chunk this is what streaming gives, whatever the hops. There is no prompt that a mask could keep.
    """
    num_rows, num_slots = batch["speech_tokens"].shape
    frames = jnp.broadcast_to(jnp.arange(FRAMES_PER_TOKEN * num_slots), (num_rows, FRAMES_PER_TOKEN * num_slots))
    mask = dataclasses.replace(mask, prompt=0)
    noise = frame_noise(keys, keys, frames, jnp.zeros((num_rows,), jnp.int32), model.config.num_mels)
    return solve(
        model, params, batch | {"prompt_mel": jnp.zeros_like(noise)}, noise, MaskSpec(kind="chunk", rows=(mask,))
    )


def offline_mask(config: FlowMatchingConfig) -> ChunkMask:
    """The widest of the trained masks: non-causal, if that is trained."""
    return max(config.masks, key=lambda mask: mask.chunk)


def stream_mask(config: FlowMatchingConfig) -> ChunkMask:
    """The narrowest of the trained masks that streams in hops of more than a token; else what comes nearest to it."""
    by_chunk = sorted(config.masks, key=lambda mask: mask.chunk)
    return next((mask for mask in by_chunk if 1 < mask.chunk < NO_CHUNK), by_chunk[0])


def choose_mask(config: FlowMatchingConfig, *, chunk: int | None = None, left: int | None = None) -> ChunkMask:
    """The mask to stream under, in tokens, without a prompt: `stream_mask`, or the first trained one with that chunk.

    Args:
      chunk: None: that of `stream_mask`. left: tokens of left context, -1: without an end; None: as trained with that chunk.
    """
    return pick_mask((stream_mask(config), *config.masks), chunk=chunk, left=left)
