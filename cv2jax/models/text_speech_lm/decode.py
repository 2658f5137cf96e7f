"""Decoding speech tokens for a batch of requests, several tokens a dispatch, over a plain pytree of slots.

A slot holds one request: its key/value cache, the pending logits of what follows all that was fed, and what was drawn.
`prefill` feeds given tokens, `decode` draws and feeds drawn ones, so the pending logits always stand behind the last
token. What a slot does depends on nothing in the other slots. B slots, S cached positions, R recent tokens.

The draw is an argument, since models import nothing of the synthesis. Only eos is ever drawn beside speech: where the
layout has a fill, the caller waits for text instead (`stream.py`), and nothing has the unused stop (spec/official.md 9,
Q5).
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from cv2jax.models.text_speech_lm.model import TextSpeechLm, TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import init_cache
from cv2jax.models.text_speech_lm.sequence import SPEECH, eos_id
from cv2jax.parallel.sharding import constrain

NO_TOKEN = -1  # where no token was drawn
RUNNING, OK, HIT_LIMIT, NON_FINITE = range(4)
STATUS_NAMES = ("running", "ok", "hit_limit", "non_finite")
SMALLEST_CACHE = 128


@typing.runtime_checkable
class Sampler(Protocol):
    """Draws the next token of one slot; hashable by value, so that equal samplers share one compilation."""

    @property
    def win_size(self) -> int:
        """R, how many recent tokens it wants to see."""
        ...

    def row(self, options: Mapping[str, Any]) -> dict[str, float | int]:
        """All that a request asks for, of what it says itself; UserError for what is unknown or cannot be done."""
        ...

    def __call__(
        self,
        key: Key[Array, ""],
        logp: Float[Array, " V"],
        recent: Int[Array, " R"],
        forbidden: Bool[Array, " V"],
        options: PyTree,
    ) -> Int[Array, ""]:
        """The token. `recent` is padded in front with NO_TOKEN; `options` are the slot's row of `Controls.options`."""
        ...


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class DecodeState:
    """What the device knows of each slot."""

    cache: PyTree  # of `init_cache`, a dict a layer
    num_cached: Int[Array, " B"]  # positions fed
    logits: Float[Array, "B V"]  # pending: of what follows
    recent: Int[Array, "B R"]  # the last speech tokens drawn, padded in front with NO_TOKEN
    num_generated: Int[Array, " B"]  # speech tokens drawn
    status: Int[Array, " B"]  # RUNNING until the request ends


@typing.no_type_check
@flax.struct.dataclass
class Controls:
    """What the caller wants of each slot in a dispatch."""

    key: Key[Array, " B"]  # the request's; draw i uses fold_in(key, i)
    options: PyTree  # [B ...] of each request, for the sampler
    min_length: Int[Array, " B"]  # no eos before so many speech tokens
    max_length: Int[Array, " B"]  # HIT_LIMIT after so many
    budget: Int[Array, " B"]  # tokens to draw in this dispatch at most; 0: the slot rests
    may_end: Bool[Array, " B"]  # whether the layout has an eos here


@typing.no_type_check
@flax.struct.dataclass
class Drawn:
    """What a dispatch drew."""

    speech_tokens: Int[Array, "B L"]  # without eos, NO_TOKEN behind the last
    num_speech_tokens: Int[Array, " B"]
    status: Int[Array, " B"]


def cache_length(num_positions: int) -> int:
    """The smallest bucket, 128 · 2^i, that holds so many positions."""
    return max(SMALLEST_CACHE, 1 << (num_positions - 1).bit_length())


def decoder_config(config: TextSpeechLmConfig) -> TextSpeechLmConfig:
    """The same model with unrolled layers: a scan would copy each layer's weights and its whole cache at every token."""
    backbone = dataclasses.replace(config.backbone, scan_layers=False, remat="none")
    return dataclasses.replace(config, backbone=backbone)


def decoder_params(config: TextSpeechLmConfig, params: PyTree) -> PyTree:
    """The parameters as the functions here take them: one tree a layer, and cast once instead of at every token.

    Norms and the head's bias stay fp32, as the model computes with them. Unrolled parameters are only cast.
    """
    return _unrolled(decoder_config(config), params)


@functools.partial(jax.jit, static_argnums=0)
def _unrolled(config: TextSpeechLmConfig, params: PyTree) -> PyTree:
    backbone = dict(params["backbone"])
    blocks = backbone.pop("blocks", None)
    if blocks is not None:
        for i in range(config.backbone.num_layers):
            backbone[f"blocks_{i}"] = jax.tree.map(lambda a, i=i: a[i], blocks)

    def cast(path: Any, leaf: Array) -> Array:
        return leaf if path[-1].key in ("scale", "head_bias") else leaf.astype(config.backbone.dtype)

    return jax.tree_util.tree_map_with_path(cast, {**params, "backbone": backbone})


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init_state(config: TextSpeechLmConfig, num_slots: int, length: int, win_size: int) -> DecodeState:
    """Empty slots with caches of `length` positions, for a sampler that sees `win_size` recent tokens."""
    zeros = jnp.zeros((num_slots,), jnp.int32)
    state = DecodeState(
        cache=init_cache(decoder_config(config).backbone, num_slots, length),
        num_cached=zeros,
        logits=jnp.zeros((num_slots, config.num_outputs), jnp.float32),
        recent=jnp.full((num_slots, win_size), NO_TOKEN, jnp.int32),
        num_generated=zeros,
        status=zeros,
    )
    return _placed(state)


@functools.partial(jax.jit, static_argnums=1)
def grow(state: DecodeState, length: int) -> DecodeState:
    """The same slots with caches of `length` positions, at least as many as before."""

    def pad(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, length - a.shape[1]), (0, 0), (0, 0)))

    return _placed(dataclasses.replace(state, cache=jax.tree.map(pad, state.cache)))


@functools.partial(jax.jit, donate_argnums=0)
def reset(state: DecodeState, slots: Bool[Array, " B"]) -> DecodeState:
    """Empties the slots that are True, each for its next request.

    Caches need no clearing but where they may hold what is not finite: a weight of 0 in the attention does not hide that.
    """
    recent = jnp.where(slots[:, None], NO_TOKEN, state.recent)
    number = {name: jnp.where(slots, 0, getattr(state, name)) for name in ("num_cached", "num_generated", "status")}
    spoilt = slots & ((state.status == NON_FINITE) | ~jnp.all(jnp.isfinite(state.logits), axis=-1))
    logits = jnp.where(spoilt[:, None], 0.0, state.logits)

    def clear(cache: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.where(spoilt[:, None, None, None], jnp.zeros((), a.dtype), a), cache)

    cache = jax.lax.cond(jnp.any(spoilt), clear, lambda cache: cache, state.cache)
    return _placed(dataclasses.replace(state, cache=cache, logits=logits, recent=recent, **number))


@functools.partial(jax.jit, static_argnums=0, static_argnames="impl", donate_argnums=2)
def prefill(
    config: TextSpeechLmConfig,
    params: PyTree,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    kinds: Int[Array, "B T"],
    num_tokens: Int[Array, " B"],
    *,
    impl: str = "xla",
) -> DecodeState:
    """Feeds the first num_tokens[b] of slot b's tokens; slots with none stay as they are, bit for bit.

    Params are those of `decoder_params`. A slot whose cache is too short (`grow`) gets NaN for logits, which `decode`
    reports as NON_FINITE.
    """
    return _placed(_feed(config, params, state, tokens, kinds, num_tokens, impl))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("num_steps", "impl"), donate_argnums=3)
def decode(
    config: TextSpeechLmConfig,
    sampler: Sampler,
    params: PyTree,
    state: DecodeState,
    controls: Controls,
    *,
    num_steps: int,
    impl: str = "xla",
) -> tuple[DecodeState, Drawn]:
    """Draws and feeds up to `num_steps` tokens a slot in one loop, which ends early when no slot goes on.

    A slot goes on while it is RUNNING, has budget, and its cache has room. It ends at eos (OK), with the last token that
    its max_length allows (HIT_LIMIT), or where its logits are not finite, without a token (NON_FINITE). Of the stops
    only eos is ever drawn, where may_end and not below min_length.
    """
    num_slots, eos = state.status.shape[0], eos_id(config.num_speech_tokens)
    outputs = jnp.arange(config.num_outputs)
    size = jax.tree.leaves(state.cache)[0].shape[1]

    def goes_on(i: Int[Array, ""], state: DecodeState) -> Bool[Array, " B"]:
        return (state.status == RUNNING) & (i < controls.budget) & (state.num_cached < size)

    def draw(state: DecodeState) -> Int[Array, " B"]:
        may_end = controls.may_end & (state.num_generated >= controls.min_length)
        forbidden = (outputs > eos) | ((outputs == eos) & ~may_end[:, None])
        keys = jax.vmap(jax.random.fold_in)(controls.key, state.num_generated)
        return jax.vmap(sampler)(keys, jax.nn.log_softmax(state.logits), state.recent, forbidden, controls.options)

    def body(carry: tuple) -> tuple:
        i, state, drawn = carry
        active, finite = goes_on(i, state), jnp.all(jnp.isfinite(state.logits), axis=-1)
        token = draw(state)
        emits = active & finite & (token != eos)
        num_generated = state.num_generated + emits
        full = num_generated >= controls.max_length
        ends = jnp.where(~finite, NON_FINITE, jnp.where(~emits, OK, jnp.where(full, HIT_LIMIT, RUNNING)))
        state = dataclasses.replace(
            state,
            num_generated=num_generated,
            status=jnp.where(active, ends, state.status).astype(jnp.int32),
            recent=jnp.where(emits[:, None], jnp.append(state.recent, token[:, None], axis=1)[:, 1:], state.recent),
        )
        state = _feed(config, params, state, token[:, None], jnp.full_like(token, SPEECH)[:, None], emits, impl)
        # A slot that rests stays at rest in this dispatch, so the column of a token is the number before it.
        return i + 1, state, drawn.at[:, i].set(jnp.where(emits, token, NO_TOKEN))

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        return (carry[0] < num_steps) & jnp.any(goes_on(carry[0], carry[1]))

    drawn = jnp.full((num_slots, num_steps), NO_TOKEN, jnp.int32)
    _, state, drawn = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, drawn))
    # Every host reads what was drawn.
    result = Drawn(
        speech_tokens=drawn, num_speech_tokens=jnp.sum(drawn != NO_TOKEN, axis=1, dtype=jnp.int32), status=state.status
    )
    return _placed(state), jax.tree.map(lambda a: constrain(a, *[None] * a.ndim), result)


def _feed(
    config: TextSpeechLmConfig,
    params: PyTree,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    kinds: Int[Array, "B T"],
    num_tokens: Int[Array, " B"] | Bool[Array, " B"],
    impl: str,
) -> DecodeState:
    model, num_tokens = TextSpeechLm(decoder_config(config), impl=impl), num_tokens.astype(jnp.int32)
    logits, cache = typing.cast(
        tuple,
        model.apply({"params": params}, tokens, kinds, num_tokens, state.num_cached, state.cache, method="extend"),
    )
    num_cached = state.num_cached + num_tokens
    fits = num_cached <= jax.tree.leaves(cache)[0].shape[1]
    logits = jnp.where(fits[:, None], logits, jnp.nan)
    logits = jnp.where((num_tokens > 0)[:, None], logits, state.logits)
    return dataclasses.replace(state, cache=cache, num_cached=num_cached, logits=logits)


def _placed(state: DecodeState) -> DecodeState:
    """Under a mesh every function returns a state in one placement, so that the next one compiles once."""
    cache = jax.tree.map(lambda a: constrain(a, "batch", "length", "act_heads", None), state.cache)
    rest = {
        name: constrain(getattr(state, name), "batch", *[None] * (getattr(state, name).ndim - 1))
        for name in ("num_cached", "logits", "recent", "num_generated", "status")
    }
    return dataclasses.replace(state, cache=cache, **rest)
