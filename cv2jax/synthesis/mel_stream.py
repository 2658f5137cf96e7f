"""Streams of mel: a voice is solved once, every request goes on from a copy of it, in hops of any whole chunks.

Chunks count from the start of the voice's recording. Of the recording all whole chunks whose look-ahead lies inside it are
kept solved; the rest is solved again with the first hop. What comes out is what `MelSolver` gives under the same mask.
"""

import collections
import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK, NO_LEFT, ChunkMask
from cv2jax.shapes import Float, Integer, Key
from cv2jax.synthesis.prompt import (
    Prompt,
    check_tokens,
    key_data,
    require_finite,
    require_frames,
    require_tokens,
    warn_untrained,
)
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, LOOKAHEAD, MelHop, MelStage, State

# Of a mask without chunks, which sees the end before the start.
NEVER_STREAMS = (
    "the flow was trained without chunks, and so it does not stream; hear it whole (--offline), stream it in chunks that it"
    " has not learnt (--chunk 25), or train one with chunks in model.mask_chunks"
)
_HOP_TOKENS = 25  # the least that a step is compiled for: 1 s
_ROOM = 200  # tokens that caches without a bound have room for at first: 8 s; then twice as many, and so on
_MAX_EXCESS = 4  # times the room that a voice needs, of caches that its requests take
_BOUNDED_ROOM = 25  # caches with a bound have room for a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SolvedVoice:
    """A voice with the state behind the first `num_solved` tokens of its recording, for streams of `owner`."""

    owner: "MelStreams"
    voice: Prompt
    num_solved: int
    room: int  # tokens, of the state
    state: State


class MelStreams:
    """The flow of one checkpoint as a stream under one mask; voices may be shared by any number of requests."""

    def __init__(
        self,
        stage: MelStage,
        mask: ChunkMask,
        *,
        hop_sizes: tuple[int, ...] = (),
        max_kept: int = 1,
    ) -> None:
        """Compiles nothing yet. A mask that training never drew is warned of.

        Args:
          mask: in tokens; its prompt is taken from the voice. hop_sizes: tokens that a step is compiled for, multiples of
            the chunk; any hop is cut into such steps. Default: what fits of the stage's, else about 1, 2 and 4 s.
          max_kept: requests that have ended whose caches are kept for later ones, the newest; as many as run side by side.

        Raises UserError for a mask that cannot stream, for hop sizes that are no multiples of its chunk, and for a chunk that
        no hop size of the stage is a multiple of.
        """
        if mask.chunk >= NO_CHUNK:
            raise UserError(NEVER_STREAMS)
        base = -(-_HOP_TOKENS // mask.chunk) * mask.chunk
        self.stage, self.mask = stage, mask
        self.hop_sizes = tuple(sorted(hop_sizes)) or _fitting_sizes(stage, mask) or (base, 2 * base, 4 * base)
        if any(size < 1 or size % mask.chunk for size in self.hop_sizes):
            raise UserError(f"hop sizes {self.hop_sizes}: must be multiples of the chunk, {mask.chunk} tokens")
        warn_untrained(stage, mask)
        # (room, state) of requests that have ended: to touch memory for the first time takes longer than a hop.
        self._kept, self._max_kept, self._warm_room = collections.deque[tuple[int, State]](), max_kept, 0

    def enroll(self, voice: Prompt) -> SolvedVoice:
        """Solves the whole chunks of the voice's recording; UserError where `Prompt.check` finds something."""
        voice.check(self.stage)
        require_frames(FRAMES_PER_TOKEN * len(voice.speech_tokens), self.stage, voice.name)
        num_prompt, chunk = len(voice.speech_tokens), self.mask.chunk
        num_solved = max(num_prompt - LOOKAHEAD, 0) // chunk * chunk
        room, key = self._room(num_solved, num_prompt), voice.key
        state = self.stage.init_state(room)
        if num_solved:
            # Of the prompt's frames nothing depends on the request's key.
            tokens, mel = voice.speech_tokens, voice.prompt_mel(self.stage)
            made, state, room = self.solve(
                (state, room), 0, tokens[: num_solved + LOOKAHEAD], num_solved, mel, voice, key
            )
            require_finite(made, 0, voice.name)
        return SolvedVoice(owner=self, voice=voice, num_solved=num_solved, room=room, state=state)

    def warm_up(self, solved: SolvedVoice, num_tokens: int) -> None:
        """Compiles all that a request of up to `num_tokens` tokens behind the voice's recording needs, so that no hop waits."""
        voice, rooms, init_state = solved.voice, [solved.room], self.stage.init_state
        while self.mask.left is None and rooms[-1] < len(voice.speech_tokens) + num_tokens:
            rooms.append(self._room(rooms[-1] + 1, 0))
        for room, size in itertools.product(rooms, self.hop_sizes):
            tokens = np.zeros(size, np.int32)
            hop = self._hop(0, tokens, size, size, np.zeros((0, self.stage.num_mels), np.float32), voice, voice.key)
            jax.block_until_ready(self.stage.step(init_state(room), hop))
        for room, larger in itertools.pairwise(rooms):
            self.stage.grow(init_state(room), larger)
        for room in rooms:
            self.stage.refill(init_state(room), solved.state)
        self._warm_room = max(self._warm_room, rooms[-1])

    def start(self, solved: SolvedVoice, key: Key[Array, ""], name: str = "request") -> "MelStream":
        """A stream behind the voice's recording, whose noise draws from `key`; UserError for another's voice."""
        if solved.owner is not self:
            raise UserError(f"{solved.voice.name}: was solved for another mask or model; enroll it here")
        return MelStream(self, solved, key, name)

    def take_state(self, solved: SolvedVoice) -> tuple[State, int]:
        """(the voice's state for a request to move on, its room), in the memory of one that has ended where that fits."""
        need = solved.room
        for _ in range(len(self._kept)):
            with contextlib.suppress(IndexError):  # taken by another thread
                room, used = self._kept.popleft()
                if self._suits(need, room):
                    return self.stage.refill(used, solved.state), room
                self._kept.append((room, used))
        return jax.tree.map(jnp.copy, solved.state), need

    def _suits(self, need: int, room: int) -> bool:
        """Whether a request that needs some room takes a state with another."""
        # A ring of another size would hold what comes next elsewhere; empty slots are not quite for nothing.
        return need <= room <= (1 if self.mask.left is not None else _MAX_EXCESS) * need

    def keep_state(self, state: State, room: int, need: int) -> None:
        """Takes the state of a request that has ended well and whose voice needs room for `need` tokens.

        Not where hops in it would have to be compiled, nor where the next request of that voice would not take it: what one
        long request has grown is not held for ever.
        """
        if self._suits(need, room) and (not self._warm_room or room <= self._warm_room):
            self._kept.append((room, state))
        while len(self._kept) > self._max_kept:
            with contextlib.suppress(IndexError):
                self._kept.popleft()

    def solve(
        self,
        held: tuple[State, int],
        num_solved: int,
        tokens: Integer[np.ndarray, " L_ahead"],
        count: int,
        mel: Float[np.ndarray, "F_prompt M"],
        voice: Prompt,
        key: Key[Array, ""],
        *,
        last: bool = False,
    ) -> tuple[Float[np.ndarray, "F M"], State, int]:
        """(mel of the next `count` tokens, next state, its room) in steps of the compiled sizes; the state is used up.

        Args:
          held: a state and its room. num_solved: in the state. tokens: from there on, with those that are only looked at.
          mel: of the prompt, from there on. last: nothing follows, so that the caches need no room for the last step.
        """
        state, has_room = held
        parts, place = [], 0
        while place < count:
            size = next((size for size in self.hop_sizes if size >= count - place), self.hop_sizes[-1])
            num = min(size, count - place)
            frames = mel[FRAMES_PER_TOKEN * place : FRAMES_PER_TOKEN * (place + size)]
            hop = self._hop(num_solved + place, tokens[place : place + num + LOOKAHEAD], num, size, frames, voice, key)
            seen = num_solved + place + (0 if last and place + num == count else num)
            if self.mask.left is None and (room := self._room(seen, 0)) > has_room:
                state, has_room = self.stage.grow(state, room), room
            part, state = self.stage.step(state, hop)
            parts.append((part, FRAMES_PER_TOKEN * num))
            place += num
        return np.concatenate([jax.device_get(part)[0, :size] for part, size in parts]), state, has_room

    def _hop(
        self,
        start: int,
        tokens: Integer[np.ndarray, " L"],
        num: int,
        size: int,
        mel: Float[np.ndarray, "F_prompt M"],
        voice: Prompt,
        key: Key[Array, ""],
    ) -> MelHop:
        num_prompt, one = len(voice.speech_tokens), lambda number: np.array([number], np.int32)
        num_frames = FRAMES_PER_TOKEN * size
        # A padded step may reach behind the end of the official noise.
        frames = np.minimum(np.arange(num_frames, dtype=np.int32), FRAMES_PER_TOKEN * num - 1)[None]
        places = frames + FRAMES_PER_TOKEN * start, one(FRAMES_PER_TOKEN * num_prompt)
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
        noise = self.stage.noise(key_data(voice.key), key_data(key), *places)
        return MelHop(noise=noise, **jax.device_put(fields))

    def _room(self, num_tokens: int, num_prompt: int) -> int:
        """Slots, in tokens, of caches that hold so many tokens; of bounded ones that keep the prompt and the left context."""
        need = num_tokens
        if self.mask.left is not None:
            need = -(-max(num_prompt + self.mask.left, 1) // _BOUNDED_ROOM) * _BOUNDED_ROOM
        if self.stage.rooms:
            return _fixed_room(self.stage.rooms, need)
        return room_for(need) if self.mask.left is None else need


class MelStream:
    """One request on its way. Errors of what is given leave it as it was; a result that is not finite ends it."""

    def __init__(self, streams: MelStreams, solved: SolvedVoice, key: Key[Array, ""], name: str) -> None:
        self._streams, self._voice, self._key, self._name = streams, solved.voice, key, name
        self._num_solved, self.has_ended, self._ahead = solved.num_solved, False, np.zeros(0, np.int32)
        self._state: State = None
        self._state, self._room = streams.take_state(solved)
        self._least_room = solved.room

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
        mel = voice.prompt_mel(self._streams.stage)[FRAMES_PER_TOKEN * at :]
        self.has_ended = True  # unless all goes well
        held, self._state = (self._state, self._room), None
        made, state, room = self._streams.solve(held, start, tokens, count, mel, voice, self._key, last=last)
        require_finite(made[: len(mel)], FRAMES_PER_TOKEN * at, voice.name)
        made, num_before = made[len(mel) :], max(start - num_prompt, 0)
        require_finite(made, FRAMES_PER_TOKEN * num_before, self._name)
        if last:
            self._streams.keep_state(state, room, self._least_room)
        else:
            self._num_solved, self.has_ended, self._ahead = start + count, False, ahead
            self._state, self._room = state, room
        return made

    def _check(self, tokens: Integer[np.ndarray, " L"], ahead: Integer[np.ndarray, " ahead"], *, last: bool) -> None:
        stage, chunk = self._streams.stage, self._streams.mask.chunk
        if self.has_ended:
            raise UserError(f"{self._name}: has ended; start another stream for more tokens")
        require_tokens(tokens, stage, self._name)
        check_tokens(ahead, stage, f"{self._name}, look-ahead")
        first = np.concatenate([tokens, ahead])[: len(self._ahead)]
        if not np.array_equal(first, self._ahead):
            raise UserError(
                f"{self._name}: goes on with tokens {first.tolist()}; the hop before looked ahead at {self._ahead.tolist()}:"
                " give the same"
            )
        num_given = max(self._num_solved, len(self._voice.speech_tokens)) + len(tokens)
        require_frames(FRAMES_PER_TOKEN * num_given, stage, self._name)
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


def _fitting_sizes(stage: MelStage, mask: ChunkMask) -> tuple[int, ...]:
    """Of the steps that the stage has programs for those of whole chunks; UserError where it has some, and none fits."""
    fitting = tuple(size for size in stage.hop_sizes if size % mask.chunk == 0)
    if stage.hop_sizes and not fitting:
        can = sorted(
            {known.chunk for known in stage.trained if any(size % known.chunk == 0 for size in stage.hop_sizes)}
        )
        mend = f"--chunk {' or '.join(map(str, can))}, as trained" if can else "a chunk that divides one of these"
        raise UserError(
            f"--chunk {mask.chunk}: the flow has programs for steps of {', '.join(map(str, stage.hop_sizes))} tokens, none of"
            f" whole chunks; give {mend}, or speak from the model directory"
        )
    return fitting


def _fixed_room(rooms: tuple[int, ...], need: int) -> int:
    """The least of the rooms that will do; UserError where none does."""
    found = next((room for room in rooms if room >= need), None)
    if found is None:
        raise UserError(
            f"the flow must hold {need} tokens, recording included, and has room for {rooms[-1]}; take a shorter text or voice,"
            " or export the model with more --seconds"
        )
    return found


def room_for(num_tokens: int) -> int:
    """Slots, in tokens, of caches without a bound that hold so many tokens."""
    return next(_ROOM << power for power in itertools.count() if _ROOM << power >= num_tokens)
