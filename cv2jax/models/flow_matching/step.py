"""The flow in hops: the same mel as `solve` under the same mask, at a cost that the sound before it hardly changes.

The solver's steps unrolled are one deep causal network, so each of them keeps its own keys, values and convolution tails:
a hop solves its own frames and reads of the others only what attention sees (paper 2.4 calls the network causal for this;
the official code solves all frames again for every hop).
"""

import dataclasses
import functools
import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cv2jax.models.flow_matching.cfm import solve_euler, with_unconditioned
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.encoder import EncoderState, StepPlaces, init_encoder_state
from cv2jax.models.flow_matching.estimator import EstimatorTails, init_tails, num_attention_layers
from cv2jax.models.flow_matching.model import FlowMatching
from cv2jax.nn.cache import EMPTY, KeyValueCache, find_slots, grow, init_cache, refill, write
from cv2jax.nn.masks import NO_LEFT, MaskSpec, chunk_array


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class FlowState:
    """What streams carry from hop to hop; rows do not depend on each other.

    Attributes:
      num_tokens: [B], solved so far, prompt included. encoder: of the encoder.
      tails: of the velocity network, [steps … 2B 2 D], the unconditioned rows behind the conditioned ones.
      cache: its keys and values, of all layers of all solver steps behind one another.
    """

    num_tokens: Int[Array, " B"]
    encoder: EncoderState
    tails: EstimatorTails
    cache: KeyValueCache


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass(kw_only=True)
class Hop:
    """The input of one step, of L tokens and F = 2·L frames.

    Attributes:
      speech_tokens: [B L+3], a row's tokens and right behind them those that are looked at.
      num_tokens: [B], to solve; in a row that has more to come they end on a border of its chunks. 0 leaves it alone.
      num_lookahead: [B], that follow: 3, or 0 at the end of a row.
      noise: [B F M], where the frames start, times the temperature.
      prompt_mel: [B F M], 0 behind the prompt; None: no row has any.
      speaker_embedding: [B E].
      chunk, left, prompt: [B], the mask of each row in tokens (see `chunk_array`).
    """

    speech_tokens: Int[Array, "B L_ahead"]
    num_tokens: Int[Array, " B"]
    num_lookahead: Int[Array, " B"]
    noise: Float[Array, "B F M"]
    prompt_mel: Float[Array, "B F M"] | None
    speaker_embedding: Float[Array, "B E"]
    chunk: Int[Array, " B"]
    left: Int[Array, " B"]
    prompt: Int[Array, " B"]


def init_state(config: FlowMatchingConfig, batch_size: int, num_slots: int) -> FlowState:
    """Before the first hop, with room for `num_slots` tokens: all there will be, or prompt and left context."""
    e = config.estimator
    tails = init_tails(config, 2 * batch_size)
    layers, slots = config.num_steps * num_attention_layers(e), FRAMES_PER_TOKEN * num_slots
    return FlowState(
        num_tokens=jnp.zeros((batch_size,), jnp.int32),
        encoder=init_encoder_state(config, batch_size, num_slots),
        tails=jax.tree.map(lambda x: jnp.zeros((config.num_steps, *x.shape), x.dtype), tails),
        cache=init_cache(layers, 2 * batch_size, e.num_heads, slots, e.head_dim, config.dtype),
    )


def state_bytes(config: FlowMatchingConfig, num_slots: int) -> int:
    """Memory that one stream's state takes, without making it; arguments as `init_state`."""
    shapes = jax.eval_shape(functools.partial(init_state, config, 1, num_slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def grow_state(state: FlowState, num_slots: int) -> FlowState:
    """The state with room for `num_slots` tokens; only while nothing was dropped from it."""
    encoder = dataclasses.replace(
        state.encoder,
        tokens=grow(state.encoder.tokens, num_slots),
        frames=grow(state.encoder.frames, FRAMES_PER_TOKEN * num_slots),
    )
    return dataclasses.replace(state, encoder=encoder, cache=grow(state.cache, FRAMES_PER_TOKEN * num_slots))


def refill_state(used: FlowState, state: FlowState) -> FlowState:
    """`state` in the memory of one that is done with, with as much room or more, if that is donated; as `grow_state`."""
    encoder = dataclasses.replace(
        state.encoder,
        tokens=refill(used.encoder.tokens, state.encoder.tokens),
        frames=refill(used.encoder.frames, state.encoder.frames),
    )
    return dataclasses.replace(state, encoder=encoder, cache=refill(used.cache, state.cache))


def step(model: FlowMatching, params: PyTree, state: FlowState, hop: Hop) -> tuple[Float[Array, "B F M"], FlowState]:
    """(mel of the hop's frames, 0 behind a row's own, next state); jit it with `state` donated."""
    c, num_tokens = model.config, hop.num_tokens
    positions = _positions(state.num_tokens, num_tokens, hop.speech_tokens.shape[1] - LOOKAHEAD, 1)
    frames = _positions(state.num_tokens, num_tokens, positions.shape[1], FRAMES_PER_TOKEN)
    pinned = jnp.where(hop.left < NO_LEFT, hop.prompt, 0)
    masks = (
        _mask(hop, 1, positions, state.encoder.tokens),
        _mask(hop, FRAMES_PER_TOKEN, frames, state.encoder.frames),
    )
    places = StepPlaces(tokens=positions, frames=frames, num_pinned=pinned)
    arguments = (hop.speech_tokens, num_tokens, hop.num_lookahead, masks, state.encoder, places)
    apply: Any = functools.partial(model.apply, {"params": params})
    mu, encoder = apply(*arguments, method="encode")
    speaker = apply(hop.speaker_embedding, method="condition")
    prompt_mel = jnp.zeros_like(mu) if hop.prompt_mel is None else hop.prompt_mel
    conditions = [with_unconditioned(x) for x in (mu, speaker, prompt_mel)]
    pair = lambda x: jnp.concatenate([x, x])  # noqa: E731
    mask = pair(_mask(hop, FRAMES_PER_TOKEN, frames, _first_rows(state.cache)))
    slots = find_slots(state.cache, pair(frames), pair(FRAMES_PER_TOKEN * pinned))
    options = {"num_frames": pair(FRAMES_PER_TOKEN * num_tokens), "method": "velocity"}

    def velocity(x: Array, time: Array, given: Any, cache: KeyValueCache) -> tuple[Array, Any, KeyValueCache]:
        layer, tails = given
        found, tails, entries = apply(
            x, time, *conditions, mask, first_layer=layer, tails=tails, cache=cache, **options
        )
        return found, tails, write(cache, entries, slots, _after(layer, found))

    inputs = (num_attention_layers(c.estimator) * jnp.arange(c.num_steps), state.tails)
    is_frame = (frames != EMPTY)[..., None]
    start = jnp.where(is_frame, c.temperature * hop.noise, 0)
    solver = {"num_steps": c.num_steps, "guidance": c.guidance, "inputs": inputs, "carried": state.cache}
    mel, tails, cache = solve_euler(velocity, start, **solver)
    cache = dataclasses.replace(cache, positions=slots.positions)
    state = FlowState(num_tokens=state.num_tokens + num_tokens, encoder=encoder, tails=tails, cache=cache)
    return jnp.where(is_frame, mel, 0), state


def _positions(start: Int[Array, " B"], count: Int[Array, " B"], size: int, rate: int) -> Int[Array, "B T"]:
    places = jnp.arange(size * rate)
    return jnp.where(places < rate * count[:, None], rate * start[:, None] + places, EMPTY)


def _mask(hop: Hop, rate: int, positions: Int[Array, "B T"], cache: KeyValueCache) -> Array:
    mask = MaskSpec(kind="chunk", chunk=hop.chunk, left=hop.left, prompt=hop.prompt).scaled(rate)
    keys = jnp.concatenate([cache.positions, positions], axis=1)
    return chunk_array(mask.chunk, mask.left, mask.prompt, positions, keys)


def _after(number: Int[Array, ""], result: Float[Array, "..."]) -> Int[Array, ""]:
    """The number, once the result is there.

    The last layer's keys are known before its attention has read the cache; in that order the cache would be copied to be
    written to. An optimization barrier is gone by the time XLA on a CPU decides about copies.
    """
    one = result.ravel()[0]
    return number + (0 * jnp.where(jnp.isfinite(one), one, 0)).astype(number.dtype)


def _first_rows(cache: KeyValueCache) -> KeyValueCache:
    """Conditioned and unconditioned rows hold the same positions."""
    return dataclasses.replace(cache, positions=jnp.split(cache.positions, 2)[0])
