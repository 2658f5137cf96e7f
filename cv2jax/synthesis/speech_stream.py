"""Speech tokens of requests whose text is whole or still arriving.

`SpeechStreams` runs the machines of `interleave.py` on the slots of a language model, `generate` a list of requests on
`SpeechStreams`. A request never takes more positions than the backbone's context has: text that leaves its speech no room is
refused as it comes, and speech that fills the room ends as hit_limit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.shapes import Int32, Integer, Key
from cv2jax.synthesis import interleave
from cv2jax.synthesis.stages import RUNNING, STATUS_NAMES, Controls, Drawn, SpeechStage
from cv2jax.text.layout import Ratio, check_token_ids, row_length

MIN_RATIO, MAX_RATIO = 2, 20  # speech tokens a text token, official defaults (spec/official.md 3.4)


def _none() -> Int32[np.ndarray, " T"]:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeechRequest:
    """What to say, and how."""

    text_tokens: Integer[np.ndarray, " T"]
    prompt_text_tokens: Integer[np.ndarray, " T_prompt"] = dataclasses.field(default_factory=_none)
    prompt_speech_tokens: Integer[np.ndarray, " L_prompt"] = dataclasses.field(default_factory=_none)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over the defaults of `SpeechStreams`
    min_length: int | None = None  # speech tokens; None: 2 a text token, the prompt's not counted
    max_length: int | None = None  # None: 20 a text token, or what the context has room for
    name: str = "request"  # what errors call it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeechResult:
    """What a request drew, without its prompt, and how it stands: running, ok, hit_limit or non_finite."""

    speech_tokens: Int32[np.ndarray, " L"]
    status: str


class _Slot:
    """The host's side of one open request."""

    def __init__(self, stage: SpeechStage, request: SpeechRequest, arriving: bool) -> None:
        self.stage, self.request = stage, request
        self.num_text = self.num_cached = self.num_drawn = self.num_speech = 0
        self.step, self.ended = interleave.Step((), (), 0, False), False
        self._check_asked()
        self._check_tokens(request.prompt_text_tokens, request.prompt_speech_tokens)
        prompt = request.prompt_text_tokens.tolist(), request.prompt_speech_tokens.tolist()
        self.progress = interleave.init(*prompt, stage.ratio if arriving else None)
        self.push_text(request.text_tokens)

    def push_text(self, tokens: Integer[np.ndarray, " T"]) -> None:
        self._check_tokens(tokens, _none())
        progress, num_text = interleave.push_text(self.progress, tokens.tolist()), self.num_text + len(tokens)
        self.lengths = self._lengths(num_text)
        self.progress, self.num_text = progress, num_text

    def flush(self) -> None:
        if self.num_text == 0:
            raise UserError(f"{self.request.name}: has no text tokens; give it some")
        self.lengths = self._lengths(self.num_text, MAX_RATIO * self.num_text)
        self.progress = interleave.flush(self.progress)

    def _check_asked(self) -> None:
        asked = self.request.min_length, self.request.max_length
        least, most = asked[0] or 0, interleave.NO_LIMIT if asked[1] is None else asked[1]
        if not 0 <= least <= most or not 1 <= most <= interleave.NO_LIMIT:
            raise UserError(
                f"{self.request.name}: min_length={least}, max_length={most}: must be 0 <= min <= max and 1 <= max <="
                f" {interleave.NO_LIMIT}"
            )

    def _check_tokens(self, text: Integer[np.ndarray, " T"], speech: Integer[np.ndarray, " L"]) -> None:
        name, stage = self.request.name, self.stage
        check_token_ids(f"{name}: text token", text, stage.text_vocabulary_size)
        check_token_ids(f"{name}: speech token", speech, stage.num_speech_tokens)

    def _lengths(self, num_text: int, most: int = interleave.NO_LIMIT) -> tuple[int, int]:
        """(min, max) speech tokens behind so much text: as asked for, else 2 a text token and `most`, cut to the room.

        UserError where the max that was asked for, or else the min and one more than is drawn, has no room. More text
        only takes room, so what `push_text` took is not refused by `flush`.
        """
        request, asked = self.request, self.request.max_length
        least = MIN_RATIO * num_text if request.min_length is None else request.min_length
        wanted = max(least if asked is None else asked, self.num_speech + (not self.ended))
        num_prompt = len(request.prompt_text_tokens) + len(request.prompt_speech_tokens)
        needed, most_positions = int(row_length(num_text + num_prompt, wanted)), self.stage.max_positions
        if needed > most_positions:
            raise UserError(
                f"{request.name}: text, prompt and {'at least' if asked is None else 'up to'} {wanted} speech tokens take"
                f" {needed} positions, more than {most_positions}; split the text or ask for less speech"
            )
        if asked is not None:
            return min(least, asked), asked
        return least, min(max(most, wanted), most_positions - needed + wanted)


class SpeechStreams:
    """Requests in the slots of one language model, each waiting for its own text; the caller sets the mesh, if any.

    Every open request draws with its own key, so its tokens depend on no other request, slot or time.
    """

    def __init__(
        self, stage: SpeechStage, *, options: Mapping[str, int | float], num_slots: int = 1, arriving: bool = True
    ) -> None:
        """Makes the caches for `num_slots` requests at once, rounded up to what the stage divides; they grow.

        Args:
          options: what the sampler takes from a request that does not say itself; UserError where it refuses them.
          arriving: lay text out in groups, else the whole text first; a request may say otherwise (`open`).

        Raises UserError for more slots than the stage can have, too.
        """
        size = _num_slots(stage, num_slots)
        self._stage, self._arriving, self._length = stage, arriving, stage.cache_lengths[0]
        self._defaults = _row(stage, options)
        self._state = stage.init_state(size, self._length)
        self._slots: list[_Slot | None] = [None] * size
        self._fresh = np.zeros(size, bool)  # to be emptied
        self._keys = np.array(jax.random.key_data(jax.random.split(jax.random.key(0), size)))
        self._options = {
            name: np.full(size, value, np.float32 if isinstance(value, float) else np.int32)
            for name, value in self._defaults.items()
        }

    @property
    def free(self) -> list[int]:
        """Slots without a request."""
        return [i for i, slot in enumerate(self._slots) if slot is None]

    def open(
        self,
        slot: int,
        request: SpeechRequest,
        key: Key[Array, ""],
        *,
        flushed: bool = False,
        arriving: bool | None = None,
    ) -> None:
        """Gives a free slot a request, whose text may go on (`push_text`) unless `flushed`.

        Args:
          arriving: lay its text out in groups, or the whole text first; None: as all requests are.

        UserError, and the slot stays free, for options that the sampler refuses, lengths that cannot be, and as
        `push_text` and `flush`.
        """
        if self._slots[slot] is not None:
            raise ValueError(f"slot {slot} is taken")
        opened = _Slot(self._stage, request, self._arriving if arriving is None else arriving)
        if flushed:
            opened.flush()
        options = _options(self._stage, self._defaults, request)
        self._slots[slot], self._fresh[slot], self._keys[slot] = opened, True, jax.random.key_data(key)
        for name, value in options.items():
            self._options[name][slot] = value

    def check(self, request: SpeechRequest) -> None:
        """Raises what `open` and `flush` would raise for a request with all of its text."""
        _Slot(self._stage, request, False).flush()
        _options(self._stage, self._defaults, request)

    def push_text(self, slot: int, tokens: Integer[np.ndarray, " T"]) -> None:
        """Appends text to an open request.

        UserError, and nothing is appended, for tokens outside the vocabulary and where prompt, text, and the speech that
        was asked for (max_length, else min_length and what is drawn) do not fit the context.
        """
        self._opened(slot).push_text(tokens)

    def flush(self, slot: int) -> None:
        """Ends the text of an open request; UserError where there was none: the request stays open, and may get some."""
        self._opened(slot).flush()

    def close(self, slot: int) -> None:
        """Frees a slot, whether its request has ended or not."""
        self._slots[slot] = None

    def advance(self, limit: int | None = None) -> dict[int, SpeechResult]:
        """One dispatch: by slot, what each request drew in it; `running` until it ends.

        Requests that wait for text or have ended are left out. `limit`: draw no more than so many tokens, 1 or more, where
        someone waits for just these; None: as many as the stage has in one dispatch.
        """
        working, limit = {}, min(limit or self._stage.num_steps, self._stage.num_steps)
        for i, slot in enumerate(self._slots):
            if slot is not None and not slot.ended:
                slot.progress, slot.step = interleave.step(slot.progress, slot.num_drawn)
                slot.num_drawn = 0
                if slot.step.tokens or slot.step.num_draws:
                    working[i] = slot
        if not working:
            return {}
        if self._fresh.any():
            self._state, self._fresh = self._stage.reset(self._state, self._fresh), np.zeros_like(self._fresh)
        self._reserve(working, limit)
        self._feed(working)
        self._state, drawn = self._stage.decode(self._state, self._controls(working, limit))
        return _collect(working, Drawn(*jax.device_get(tuple(drawn))))

    def warm_up(self, num_positions: int) -> None:
        """Gives the caches room for requests of so many positions at once, and compiles all that these need.

        No slot notices. A later request that needs more room still waits for its programs.
        """
        self._grow(min(num_positions, self._stage.max_positions))
        none = np.zeros(len(self._slots), np.int32)
        for size in self._stage.prefill_sizes:
            if size <= self._length:
                tokens = np.zeros((len(self._slots), size), np.int32)
                self._state = self._stage.prefill(self._state, tokens, tokens, none)
        self._state = self._stage.reset(self._state, none.astype(bool))
        self._state, drawn = self._stage.decode(self._state, self._controls({}, 0))
        jax.block_until_ready(tuple(drawn))

    def _reserve(self, working: dict[int, _Slot], limit: int) -> None:
        """Caches with room for what this dispatch feeds and draws."""
        needed = max(
            slot.num_cached + len(slot.step.tokens) + min(slot.step.num_draws, limit) for slot in working.values()
        )
        self._grow(min(needed, self._stage.max_positions))  # where max_length ends a request at the latest

    def _grow(self, needed: int) -> None:
        if needed > self._length:
            self._length = next(length for length in self._stage.cache_lengths if length >= needed)
            self._state = self._stage.grow(self._state, self._length)

    def _feed(self, working: dict[int, _Slot]) -> None:
        """Feeds all rows together, long ones in several chunks."""
        longest, at = max(len(slot.step.tokens) for slot in working.values()), 0
        while at < longest:
            size = chunk_size(self._stage.prefill_sizes, longest - at)
            tokens, kinds = np.zeros((2, len(self._slots), size), np.int32)
            num_tokens = np.zeros(len(self._slots), np.int32)
            for i, slot in working.items():
                part = slice(at, at + size)
                number = num_tokens[i] = len(slot.step.tokens[part])
                tokens[i, :number], kinds[i, :number] = slot.step.tokens[part], slot.step.kinds[part]
                slot.num_cached += int(number)
            self._state = self._stage.prefill(self._state, tokens, kinds, num_tokens)
            at += size

    def _controls(self, working: dict[int, _Slot], limit: int) -> Controls:
        least, most, budget = np.zeros((3, len(self._slots)), np.int32)
        may_end = np.zeros(len(self._slots), bool)
        for i, slot in working.items():
            least[i], most[i] = slot.lengths
            budget[i], may_end[i] = min(slot.step.num_draws, limit), slot.step.in_tail
        # Copies, since a transfer may read them later; numpy, which every host may pass to a jit under a mesh.
        return Controls(
            key=self._keys.copy(),
            options={name: values.copy() for name, values in self._options.items()},
            min_length=least,
            max_length=most,
            budget=budget,
            may_end=may_end,
        )

    def _opened(self, slot: int) -> _Slot:
        opened = self._slots[slot]
        if opened is None:
            raise ValueError(f"slot {slot} has no request")
        return opened


def chunk_size(sizes: Sequence[int], rest: int) -> int:
    """The one of the ascending sizes that feeds the next of `rest` tokens: that which holds them, but never half empty.

    Padding takes as long as tokens do. Of what is left over the smallest size takes whatever there is.
    """
    fitting = next((size for size in sizes if size >= rest), sizes[-1])
    return fitting if fitting < 2 * rest else max((size for size in sizes if size <= rest), default=sizes[0])


def _num_slots(stage: SpeechStage, wanted: int) -> int:
    """The least number of slots that the stage can have."""
    if not stage.slot_counts:
        return -(-wanted // stage.slot_multiple) * stage.slot_multiple
    found = next((count for count in stage.slot_counts if count >= wanted), None)
    if found is None:
        raise UserError(
            f"{wanted} requests at once: this model's programs serve {stage.slot_counts[-1]}; ask for fewer, or export it with"
            " more --slots"
        )
    return found


def _row(stage: SpeechStage, options: Mapping[str, Any]) -> dict[str, float | int]:
    """What the sampler takes; UserError where it refuses it, and for no bound where it draws among less than all tokens."""
    row, most = stage.sampler.row(options), stage.sampler.num_candidates
    if not row["top_k"] and most < stage.num_speech_tokens:
        raise UserError(
            f"sampling.top_k=0: sets no bound, and this model's programs draw among {most} candidates; give 1 to {most}"
        )
    return row


def _options(stage: SpeechStage, defaults: Mapping[str, float | int], request: SpeechRequest) -> dict[str, float | int]:
    try:
        return _row(stage, {**defaults, **request.options})
    except UserError as error:
        raise UserError(f"{request.name}: {error}") from None


def _collect(working: dict[int, _Slot], drawn: Drawn) -> dict[int, SpeechResult]:
    results = {}
    for i, slot in working.items():
        slot.num_drawn = int(drawn.num_speech_tokens[i])
        slot.num_cached += slot.num_drawn
        slot.num_speech += slot.num_drawn
        slot.ended = bool(drawn.status[i] != RUNNING)
        if slot.step.num_draws:
            tokens = np.array(drawn.speech_tokens[i, : slot.num_drawn], np.int32)
            results[i] = SpeechResult(speech_tokens=tokens, status=STATUS_NAMES[int(drawn.status[i])])
    return results


def generate(
    stage: SpeechStage,
    requests: Sequence[SpeechRequest],
    *,
    options: Mapping[str, int | float],
    seed: int = 0,
    stream: bool = False,
    ratio: Ratio | None = None,
    max_slots: int = 32,
) -> list[SpeechResult]:
    """Speech tokens of any number of requests, at most `max_slots` at once, in their order.

    `stream` lays them out as if their text arrived, in groups of `ratio` (by default the stage's), else the whole text
    comes first. Request i draws with fold_in(key(seed), i), whatever else is in the list. The caller sets the mesh, if any.
    Other arguments as `SpeechStreams`. UserError, before anything is decoded, as its `open`.
    """
    stage = dataclasses.replace(stage, ratio=ratio or stage.ratio)
    defaults = stage.sampler.row(options)
    for request in requests:
        _Slot(stage, request, stream).flush()
        _options(stage, defaults, request)
    num_slots = min(max_slots, 1 << max(len(requests) - 1, 0).bit_length())  # few batch sizes to compile
    streams = SpeechStreams(stage, options=options, num_slots=num_slots, arriving=stream)
    pieces: list[list[SpeechResult]] = [[] for _ in requests]
    waiting, held = list(reversed(range(len(requests)))), dict[int, int]()
    while waiting or held:
        for slot in streams.free[: len(waiting)]:
            held[slot] = waiting.pop()
            key = jax.random.fold_in(jax.random.key(seed), held[slot])
            streams.open(slot, requests[held[slot]], key, flushed=True)
        for slot, result in streams.advance().items():
            pieces[held[slot]].append(result)
            if result.status != "running":
                streams.close(slot)
                del held[slot]
    return [
        SpeechResult(speech_tokens=np.concatenate([r.speech_tokens for r in p]), status=p[-1].status) for p in pieces
    ]
