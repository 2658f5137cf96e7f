"""What training draws at random of each utterance: time, noise, prompt, condition dropout and mask."""

import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from cv2jax.models.flow_matching.config import DRAWN_PROMPT, FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.nn.masks import MaskSpec


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class FlowDraws:
    """The draws of a batch.

    Attributes:
      time: [B], in 0 … 1. noise: [B F M]. num_prompt: [B], frames that are given. is_conditioned: [B].
      mask: who sees whom, in tokens, without segments. mask_index: [B], which of the config's masks that is.
    """

    time: Float[Array, " B"]
    noise: Float[Array, "B F M"]
    num_prompt: Int[Array, " B"]
    is_conditioned: Bool[Array, " B"]
    mask: MaskSpec
    mask_index: Int[Array, " B"]


def draw(
    config: FlowMatchingConfig,
    key: Key[Array, ""],
    num_tokens: Int[Array, " B"],
    num_slots: int,
    *,
    static_masks: bool = False,
) -> FlowDraws:
    """The draws for rows of `num_tokens` tokens in shapes of `num_slots`.

    A mask is drawn for each row or for the batch, as data: one program serves all. `static_masks` deals them out instead,
    row r gets mask r mod their number, for a kernel that is compiled for its mask; the rows come in random order anyway.
    """
    c, num_rows = config, num_tokens.shape[0]
    keys = jax.random.split(key, 6)
    longest = (c.prompt_share * (FRAMES_PER_TOKEN * num_tokens)).astype(jnp.int32)
    num_prompt = jax.random.randint(keys[2], (num_rows,), 0, longest + 1)
    num_prompt = jnp.where(jax.random.bernoulli(keys[3], c.no_prompt, (num_rows,)), 0, num_prompt)
    index = jnp.arange(num_rows) % len(c.masks)
    if not static_masks:
        shape = (num_rows if c.mask_per == "utterance" else 1,)
        index = jnp.broadcast_to(jax.random.randint(keys[5], shape, 0, len(c.masks)), (num_rows,))
    return FlowDraws(
        time=jax.random.uniform(keys[0], (num_rows,)),
        noise=jax.random.normal(keys[1], (num_rows, FRAMES_PER_TOKEN * num_slots, c.num_mels)),
        num_prompt=num_prompt,
        is_conditioned=~jax.random.bernoulli(keys[4], c.condition_dropout, (num_rows,)),
        mask=MaskSpec(kind="chunk", rows=c.masks) if static_masks else _as_data(c, index, num_prompt),
        mask_index=index,
    )


def _as_data(config: FlowMatchingConfig, index: Int[Array, " B"], num_prompt: Int[Array, " B"]) -> MaskSpec:
    table = MaskSpec(kind="chunk", rows=config.masks).as_data(len(config.masks))
    data = {name: getattr(table, name)[index] for name in ("chunk", "left", "prompt")}
    if DRAWN_PROMPT in config.mask_prompts:
        drawn = jnp.asarray(config.mask_prompts)[index] == DRAWN_PROMPT
        data["prompt"] = jnp.where(drawn, -(-num_prompt // FRAMES_PER_TOKEN), data["prompt"])
    return MaskSpec(kind="chunk", **data)
