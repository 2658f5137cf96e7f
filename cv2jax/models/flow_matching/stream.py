"""Streams of mel: a voice is solved once, every request goes on from a copy of it, in hops of any whole chunks.

Chunks count from the start of the voice's recording. Of the recording all whole chunks whose look-ahead lies inside it are
kept solved; the rest is solved again with the first hop. What comes out is what `FlowSolver` gives under the same mask.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key, PyTree

from cv2jax.config import UserError
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.model import FlowMatching
from cv2jax.models.flow_matching.step import FlowState, Hop, grow_state, init_state, refill_state, step
from cv2jax.models.flow_matching.voice import (
    Voice,
    check_tokens,
    require_finite,
    require_official_noise,
    require_tokens,
    start_noise,
    warn_untrained,
)
from cv2jax.nn.masks import NO_CHUNK, NO_LEFT, ChunkMask

_HOP_TOKENS = 25  # the least that a step is compiled for: 1 s
_ROOM = 200  # tokens that caches without a bound have room for at first: 8 s; then twice as many, and so on
_MAX_EXCESS = 4  # times the room that a voice needs, of caches that its requests take
_BOUNDED_ROOM = 25  # caches with a bound have room for a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SolvedVoice:
    """A voice with the state behind the first `num_solved` tokens of its recording, for streams of `owner`."""

    owner: "FlowStreams"
    voice: Voice
    num_solved: int
    state: FlowState


class FlowStreams:
    """The flow of one checkpoint as a stream under one mask; voices may be shared by any number of requests."""

    def __init__(
        self,
        config: FlowMatchingConfig,
        params: PyTree,
        mask: ChunkMask,
        *,
        hop_sizes: tuple[int, ...] = (),
        max_kept: int = 1,
        use_official_noise: bool = False,
    ) -> None:
        """Compiles nothing yet. A mask that training never drew is warned of.

        Args:
          mask: in tokens; its prompt is taken from the voice. hop_sizes: tokens that a step is compiled for, multiples of
            the chunk; any hop is cut into such steps. Default: about 1, 2 and 4 s.
          max_kept: requests that have ended whose caches are kept for later ones, the newest; as many as run side by side.
          use_official_noise: start from the fixed buffer of the official code instead of noise drawn from the keys.

        Raises UserError for a mask that cannot stream and for hop sizes that are no multiples of its chunk.
        """
        if mask.chunk >= NO_CHUNK:
            raise UserError(
                "a mask without chunks sees the end before the start: stream under another, or use FlowSolver"
            )
        base = -(-_HOP_TOKENS // mask.chunk) * mask.chunk
        self.config, self.mask, self.hop_sizes = config, mask, tuple(sorted(hop_sizes)) or (base, 2 * base, 4 * base)
        self.use_official_noise = use_official_noise
        if any(size < 1 or size % mask.chunk for size in self.hop_sizes):
            raise UserError(f"hop sizes {self.hop_sizes}: must be multiples of the chunk, {mask.chunk} tokens")
        warn_untrained(config, mask)
        self._step, self._params = _program(config), params
        # Of requests that have ended: to touch memory for the first time takes longer than a hop.
        self._kept, self._max_kept, self._warm_room = collections.deque[FlowState](), max_kept, 0

    def enroll(self, voice: Voice) -> SolvedVoice:
        """Solves the whole chunks of the voice's recording; UserError where `Voice.check` finds something."""
        voice.check(self.config)
        if self.use_official_noise:
            require_official_noise(FRAMES_PER_TOKEN * len(voice.speech_tokens), self.config, voice.name)
        num_prompt, chunk = len(voice.speech_tokens), self.mask.chunk
        num_solved = max(num_prompt - LOOKAHEAD, 0) // chunk * chunk
        state, key = init_state(self.config, 1, self._room(num_solved, num_prompt)), voice.key
        if num_solved:
            # Of the prompt's frames nothing depends on the request's key.
            tokens, mel = voice.speech_tokens, voice.prompt_mel(self.config)
            made, state = self.solve(state, 0, tokens[: num_solved + LOOKAHEAD], num_solved, mel, voice, key)
            require_finite(made, 0, voice.name)
        return SolvedVoice(owner=self, voice=voice, num_solved=num_solved, state=state)

    def warm_up(self, solved: SolvedVoice, num_tokens: int) -> None:
        """Compiles all that a request of up to `num_tokens` tokens behind the voice's recording needs, so that no hop waits."""
        voice, rooms = solved.voice, [_num_slots(solved.state)]
        while self.mask.left is None and rooms[-1] < len(voice.speech_tokens) + num_tokens:
            rooms.append(self._room(rooms[-1] + 1, 0))
        for room, size in itertools.product(rooms, self.hop_sizes):
            state, tokens = init_state(self.config, 1, room), np.zeros(size, np.int32)
            hop = self._hop(0, tokens, size, size, np.zeros((0, self.config.num_mels), np.float32), voice, voice.key)
            jax.block_until_ready(self._step(self._params, state, hop))
        for room, larger in itertools.pairwise(rooms):
            grow_state(init_state(self.config, 1, room), larger)
        for room in rooms:
            recycle(init_state(self.config, 1, room), solved.state)
        self._warm_room = max(self._warm_room, rooms[-1])

    def start(self, solved: SolvedVoice, key: Key[Array, ""], name: str = "request") -> "FlowStream":
        """A stream behind the voice's recording, whose noise draws from `key`; UserError for another's voice."""
        if solved.owner is not self:
            raise UserError(f"{solved.voice.name}: was solved for another mask or model; enroll it here")
        return FlowStream(self, solved, key, name)

    def take_state(self, solved: SolvedVoice) -> FlowState:
        """The voice's state for a request to move on, in the memory of one that has ended where that has the right size."""
        need, most = _num_slots(solved.state), 1 if self.mask.left is not None else _MAX_EXCESS
        # A ring of another size would hold what comes next elsewhere; empty slots are not quite for nothing.
        for _ in range(len(self._kept)):
            with contextlib.suppress(IndexError):  # taken by another thread
                used = self._kept.popleft()
                if need <= _num_slots(used) <= most * need:
                    return recycle(used, solved.state)
                self._kept.append(used)
        return jax.tree.map(jnp.copy, solved.state)

    def keep_state(self, state: FlowState) -> None:
        """Takes the state of a request that has ended well, unless hops in it would have to be compiled."""
        if not self._warm_room or _num_slots(state) <= self._warm_room:
            self._kept.append(state)
        while len(self._kept) > self._max_kept:
            with contextlib.suppress(IndexError):
                self._kept.popleft()

    def solve(
        self,
        state: FlowState,
        num_solved: int,
        tokens: Integer[np.ndarray, " L_ahead"],
        count: int,
        mel: Float[np.ndarray, "F_prompt M"],
        voice: Voice,
        key: Key[Array, ""],
        *,
        last: bool = False,
    ) -> tuple[Float[np.ndarray, "F M"], FlowState]:
        """(mel of the next `count` tokens, next state) in steps of the compiled sizes; `state` is used up.

        Args:
          num_solved: in the state. tokens: from there on, with those that are only looked at. mel: of the prompt, from
            there on. last: nothing follows, so that the caches need no room for the last step.
        """
        parts, place = [], 0
        while place < count:
            size = next((size for size in self.hop_sizes if size >= count - place), self.hop_sizes[-1])
            num = min(size, count - place)
            frames = mel[FRAMES_PER_TOKEN * place : FRAMES_PER_TOKEN * (place + size)]
            hop = self._hop(num_solved + place, tokens[place : place + num + LOOKAHEAD], num, size, frames, voice, key)
            seen = num_solved + place + (0 if last and place + num == count else num)
            if self.mask.left is None and (room := self._room(seen, 0)) > _num_slots(state):
                state = grow_state(state, room)
            part, state = self._step(self._params, state, hop)
            parts.append((part, FRAMES_PER_TOKEN * num))
            place += num
        return np.concatenate([jax.device_get(part)[0, :size] for part, size in parts]), state

    def _hop(
        self,
        start: int,
        tokens: Integer[np.ndarray, " L"],
        num: int,
        size: int,
        mel: Float[np.ndarray, "F_prompt M"],
        voice: Voice,
        key: Key[Array, ""],
    ) -> Hop:
        c, num_prompt, one = self.config, len(voice.speech_tokens), lambda number: np.array([number], np.int32)
        num_frames = FRAMES_PER_TOKEN * size
        # A padded step may reach behind the end of the official noise.
        frames = np.minimum(np.arange(num_frames, dtype=np.int32), FRAMES_PER_TOKEN * num - 1)[None]
        places = jnp.asarray(frames + FRAMES_PER_TOKEN * start), jnp.asarray(one(FRAMES_PER_TOKEN * num_prompt))
        fields = {
            "speech_tokens": np.pad(tokens, (0, size + LOOKAHEAD - len(tokens)))[None].astype(np.int32),
            "num_tokens": one(num),
            "num_lookahead": one(len(tokens) - num),
            "prompt_mel": np.pad(mel, ((0, num_frames - len(mel)), (0, 0)))[None],
            "speaker_embedding": np.asarray(voice.speaker_embedding, np.float32)[None],
            "chunk": one(self.mask.chunk),
            "left": one(NO_LEFT if self.mask.left is None else self.mask.left),
            "prompt": one(num_prompt),
        }
        noise = start_noise(voice.key[None], key[None], *places, c.num_mels, official=self.use_official_noise)
        return Hop(noise=noise, **jax.device_put(fields))

    def _room(self, num_tokens: int, num_prompt: int) -> int:
        """Slots, in tokens, of caches that hold so many tokens; of bounded ones that keep the prompt and the left context."""
        if self.mask.left is not None:
            return -(-max(num_prompt + self.mask.left, 1) // _BOUNDED_ROOM) * _BOUNDED_ROOM
        return room_for(num_tokens)


class FlowStream:
    """One request on its way. Errors of what is given leave it as it was; a result that is not finite ends it."""

    def __init__(self, streams: FlowStreams, solved: SolvedVoice, key: Key[Array, ""], name: str) -> None:
        self._streams, self._voice, self._key, self._name = streams, solved.voice, key, name
        self._num_solved, self.has_ended, self._ahead = solved.num_solved, False, np.zeros(0, np.int32)
        self._state: Any = streams.take_state(solved)

    def num_to_border(self) -> int:
        """Tokens of the shortest next hop that is not the last one: to the end of the chunk."""
        chunk, num_given = self._streams.mask.chunk, max(self._num_solved, len(self._voice.speech_tokens))
        return chunk - num_given % chunk

    def hop(
        self, speech_tokens: Integer[np.ndarray, " L"], lookahead: Integer[np.ndarray, " ahead"] | None = None
    ) -> Float[np.ndarray, "F M"]:
        """The log-mel, F = 2·L, of the tokens behind those of the hops before.

        Args:
          lookahead: the three tokens that follow, which the next hop begins with; None: nothing follows, the last hop.

        Raises UserError for no token and ids out of range, for tokens that are not those looked at before, for a hop that is
        not the last and does not end where a chunk does, for one after the last, and for a mel that is not finite.
        """
        last = lookahead is None
        ahead = np.zeros(0, np.int32) if lookahead is None else lookahead
        self._check(speech_tokens, ahead, last=last)
        voice, num_prompt = self._voice, len(self._voice.speech_tokens)
        start, at = self._num_solved, min(self._num_solved, num_prompt)
        tokens = np.concatenate([voice.speech_tokens[at:], speech_tokens, ahead]).astype(np.int32)
        count = len(tokens) - len(ahead)
        mel = voice.prompt_mel(self._streams.config)[FRAMES_PER_TOKEN * at :]
        self.has_ended = True  # unless all goes well
        state, self._state = self._state, None
        made, state = self._streams.solve(state, start, tokens, count, mel, voice, self._key, last=last)
        require_finite(made[: len(mel)], FRAMES_PER_TOKEN * at, voice.name)
        made, num_before = made[len(mel) :], max(start - num_prompt, 0)
        require_finite(made, FRAMES_PER_TOKEN * num_before, self._name)
        if last:
            self._streams.keep_state(state)
        else:
            self._num_solved, self.has_ended, self._state, self._ahead = start + count, False, state, ahead
        return made

    def _check(self, tokens: Integer[np.ndarray, " L"], ahead: Integer[np.ndarray, " ahead"], *, last: bool) -> None:
        config, chunk = self._streams.config, self._streams.mask.chunk
        if self.has_ended:
            raise UserError(f"{self._name}: has ended; start another stream for more tokens")
        require_tokens(tokens, config, self._name)
        check_tokens(ahead, config, f"{self._name}, look-ahead")
        first = np.concatenate([tokens, ahead])[: len(self._ahead)]
        if not np.array_equal(first, self._ahead):
            raise UserError(
                f"{self._name}: goes on with tokens {first.tolist()}; the hop before looked ahead at {self._ahead.tolist()}:"
                " give the same"
            )
        num_given = max(self._num_solved, len(self._voice.speech_tokens)) + len(tokens)
        if self._streams.use_official_noise:
            require_official_noise(FRAMES_PER_TOKEN * num_given, config, self._name)
        if last:
            return
        if len(ahead) != LOOKAHEAD:
            raise UserError(
                f"{self._name}: {len(ahead)} tokens of look-ahead; give {LOOKAHEAD}, or None with the last hop"
            )
        if (len(tokens) - self.num_to_border()) % chunk:
            raise UserError(
                f"{self._name}: a hop of {len(tokens)} tokens ends inside a chunk, counted from the start of the prompt;"
                f" give {self.num_to_border()}, or a multiple of {chunk} more, or all that are left as the last hop"
            )


def room_for(num_tokens: int) -> int:
    """Slots, in tokens, of caches without a bound that hold so many tokens."""
    return next(_ROOM << power for power in itertools.count() if _ROOM << power >= num_tokens)


@functools.cache
def _program(config: FlowMatchingConfig) -> Any:
    """`step` of (params, state, hop), one for all masks and voices: those are data."""
    return jax.jit(functools.partial(step, FlowMatching(config)), donate_argnums=1)


recycle = jax.jit(refill_state, donate_argnums=0)


def _num_slots(state: FlowState) -> int:
    return state.encoder.tokens.positions.shape[1]
