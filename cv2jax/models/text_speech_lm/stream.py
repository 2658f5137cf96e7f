"""Speech tokens of requests whose text is whole or still arriving.

`Streams` runs the machines of `interleave.py` on the slots of `decode.py`, `generate` a list of requests on `Streams`.
A request never takes more than the MAX_POSITIONS of the backbone: text that leaves its speech no room is refused as it
comes, and speech that fills the room ends as hit_limit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, Integer, Key, PyTree

from cv2jax.config import UserError
from cv2jax.models.text_speech_lm import decode, interleave
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.sequence import Ratio, build_row, row_length
from cv2jax.parallel.sharding import num_batch_shards

MAX_POSITIONS = 32_768  # that the backbone was trained for (max_position_embeddings)
MIN_RATIO, MAX_RATIO = 2, 20  # speech tokens a text token, official defaults (spec/official.md 3.4)
CHUNKS = (8, 32, 128, 512)  # lengths that rows are fed in: few shapes to compile


def _none() -> Int32[np.ndarray, " T"]:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to say, and how."""

    text_tokens: Integer[np.ndarray, " T"]
    prompt_text_tokens: Integer[np.ndarray, " T_prompt"] = dataclasses.field(default_factory=_none)
    prompt_speech_tokens: Integer[np.ndarray, " L_prompt"] = dataclasses.field(default_factory=_none)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over the defaults of `Streams`
    min_length: int | None = None  # speech tokens; None: 2 a text token, the prompt's not counted
    max_length: int | None = None  # None: 20 a text token, or what the context has room for
    name: str = "request"  # what errors call it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a request drew, without its prompt, and how it stands: running, ok, hit_limit or non_finite."""

    speech_tokens: Int32[np.ndarray, " L"]
    status: str


class _Slot:
    """The host's side of one open request."""

    def __init__(self, config: TextSpeechLmConfig, request: Request, arriving: bool) -> None:
        self.config, self.request = config, request
        self.num_text = self.num_cached = self.num_drawn = self.num_speech = 0
        self.step, self.ended = interleave.Step((), (), 0, False), False
        self._check_asked()
        self._check_tokens(request.prompt_text_tokens, request.prompt_speech_tokens)
        prompt = request.prompt_text_tokens.tolist(), request.prompt_speech_tokens.tolist()
        self.progress = interleave.init(*prompt, config.ratio if arriving else None)
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
        if not 0 <= least <= most or most < 1:
            raise UserError(
                f"{self.request.name}: min_length={least}, max_length={most}: must be 0 <= min <= max and max >= 1"
            )

    def _check_tokens(self, text: Integer[np.ndarray, " T"], speech: Integer[np.ndarray, " L"]) -> None:
        # The errors of the layout; a further token, because here a piece of text may be empty.
        c, padded = self.config, np.append(text, 0).astype(np.int64)
        sizes: dict[str, Any] = {
            "text_vocabulary_size": c.backbone.vocabulary_size,
            "num_speech_tokens": c.num_speech_tokens,
        }
        build_row(padded, speech, bistream=False, name=self.request.name, **sizes)

    def _lengths(self, num_text: int, most: int = interleave.NO_LIMIT) -> tuple[int, int]:
        """(min, max) speech tokens behind so much text: as asked for, else 2 a text token and `most`, cut to the room.

        UserError where the max that was asked for, or else the min and one more than is drawn, has no room. More text
        only takes room, so what `push_text` took is not refused by `flush`.
        """
        request, asked = self.request, self.request.max_length
        least = MIN_RATIO * num_text if request.min_length is None else request.min_length
        wanted = max(least if asked is None else asked, self.num_speech + (not self.ended))
        num_prompt = len(request.prompt_text_tokens) + len(request.prompt_speech_tokens)
        needed = int(row_length(num_text + num_prompt, wanted))
        if needed > MAX_POSITIONS:
            raise UserError(
                f"{request.name}: text, prompt and {'at least' if asked is None else 'up to'} {wanted} speech tokens take"
                f" {needed} positions, more than {MAX_POSITIONS}; split the text or ask for less speech"
            )
        if asked is not None:
            return min(least, asked), asked
        return least, min(max(most, wanted), MAX_POSITIONS - needed + wanted)


class Streams:
    """Requests in the slots of one decoder, each waiting for its own text; the caller sets the mesh, if any.

    Every open request draws with its own key, so its tokens depend on no other request, slot or time.
    """

    def __init__(
        self,
        config: TextSpeechLmConfig,
        params: PyTree,
        sampler: decode.Sampler,
        *,
        options: Mapping[str, int | float],
        num_slots: int = 1,
        num_steps: int = 25,
        arriving: bool = True,
        impl: str = "xla",
    ) -> None:
        """Makes the caches for `num_slots` requests at once, rounded up to what the mesh divides; they grow.

        Args:
          params: of `decode.decoder_params`. options: what the sampler takes from a request that does not say itself;
            UserError where it refuses them.
          num_steps: tokens a dispatch. arriving: lay text out in groups, else the whole text first. impl: of attention.
        """
        mesh = jax.sharding.get_mesh()
        shards = 1 if mesh.empty else num_batch_shards(mesh)
        size = -(-num_slots // shards) * shards
        self._config, self._params, self._sampler, self._impl = config, params, sampler, impl
        self._defaults = sampler.row(options)
        self._num_steps, self._arriving, self._length = num_steps, arriving, decode.SMALLEST_CACHE
        self._state = decode.init_state(config, size, self._length, sampler.win_size)
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

    def open(self, slot: int, request: Request, key: Key[Array, ""], *, flushed: bool = False) -> None:
        """Gives a free slot a request, whose text may go on (`push_text`) unless `flushed`.

        UserError, and the slot stays free, for options that the sampler refuses, lengths that cannot be, and as
        `push_text` and `flush`.
        """
        if self._slots[slot] is not None:
            raise ValueError(f"slot {slot} is taken")
        opened = _Slot(self._config, request, self._arriving)
        if flushed:
            opened.flush()
        options = _options(self._sampler, self._defaults, request)
        self._slots[slot], self._fresh[slot], self._keys[slot] = opened, True, jax.random.key_data(key)
        for name, value in options.items():
            self._options[name][slot] = value

    def push_text(self, slot: int, tokens: Integer[np.ndarray, " T"]) -> None:
        """Appends text to an open request.

        UserError, and nothing is appended, for tokens outside the vocabulary and where prompt, text, and the speech that
        was asked for (max_length, else min_length and what is drawn) do not fit MAX_POSITIONS.
        """
        self._opened(slot).push_text(tokens)

    def flush(self, slot: int) -> None:
        """Ends the text of an open request; UserError where there was none: the request stays open, and may get some."""
        self._opened(slot).flush()

    def close(self, slot: int) -> None:
        """Frees a slot, whether its request has ended or not."""
        self._slots[slot] = None

    def advance(self) -> dict[int, Result]:
        """One dispatch: by slot, what each request drew in it; `running` until it ends.

        Requests that wait for text or have ended are left out.
        """
        working = {}
        for i, slot in enumerate(self._slots):
            if slot is not None and not slot.ended:
                slot.progress, slot.step = interleave.step(slot.progress, slot.num_drawn)
                slot.num_drawn = 0
                if slot.step.tokens or slot.step.num_draws:
                    working[i] = slot
        if not working:
            return {}
        if self._fresh.any():
            self._state, self._fresh = decode.reset(self._state, self._fresh), np.zeros_like(self._fresh)
        self._reserve(working)
        self._feed(working)
        fixed, wanted = (self._config, self._sampler, self._params), self._controls(working)
        self._state, drawn = decode.decode(*fixed, self._state, wanted, num_steps=self._num_steps, impl=self._impl)
        return _collect(working, jax.device_get(drawn))

    def _reserve(self, working: dict[int, _Slot]) -> None:
        """Caches with room for what this dispatch feeds and draws."""
        needed = max(
            slot.num_cached + len(slot.step.tokens) + min(slot.step.num_draws, self._num_steps)
            for slot in working.values()
        )
        needed = min(needed, MAX_POSITIONS)  # where max_length ends a request at the latest
        if needed > self._length:
            self._length = decode.cache_length(needed)
            self._state = decode.grow(self._state, self._length)

    def _feed(self, working: dict[int, _Slot]) -> None:
        """Feeds all rows together, long ones in several chunks."""
        longest, at = max(len(slot.step.tokens) for slot in working.values()), 0
        while at < longest:
            size = min((c for c in CHUNKS if c >= longest - at), default=CHUNKS[-1])
            tokens, kinds = np.zeros((2, len(self._slots), size), np.int32)
            num_tokens = np.zeros(len(self._slots), np.int32)
            for i, slot in working.items():
                part = slice(at, at + size)
                number = num_tokens[i] = len(slot.step.tokens[part])
                tokens[i, :number], kinds[i, :number] = slot.step.tokens[part], slot.step.kinds[part]
                slot.num_cached += int(number)
            self._state = decode.prefill(
                self._config, self._params, self._state, tokens, kinds, num_tokens, impl=self._impl
            )
            at += size

    def _controls(self, working: dict[int, _Slot]) -> decode.Controls:
        least, most, budget = np.zeros((3, len(self._slots)), np.int32)
        may_end = np.zeros(len(self._slots), bool)
        for i, slot in working.items():
            least[i], most[i] = slot.lengths
            budget[i], may_end[i] = slot.step.num_draws, slot.step.in_tail
        # Copies, since a transfer may read them later; numpy, which every host may pass to a jit under a mesh.
        values: dict[str, Any] = {
            "key": jax.random.wrap_key_data(np.array(self._keys)),  # pyrefly: ignore[bad-argument-type]
            "options": {name: values.copy() for name, values in self._options.items()},
            "min_length": least,
            "max_length": most,
            "budget": budget,
            "may_end": may_end,
        }
        return decode.Controls(**values)

    def _opened(self, slot: int) -> _Slot:
        opened = self._slots[slot]
        if opened is None:
            raise ValueError(f"slot {slot} has no request")
        return opened


def _options(sampler: decode.Sampler, defaults: Mapping[str, float | int], request: Request) -> dict[str, float | int]:
    try:
        return sampler.row({**defaults, **request.options})
    except UserError as error:
        raise UserError(f"{request.name}: {error}") from None


def _collect(working: dict[int, _Slot], drawn: decode.Drawn) -> dict[int, Result]:
    results = {}
    for i, slot in working.items():
        slot.num_drawn = int(drawn.num_speech_tokens[i])
        slot.num_cached += slot.num_drawn
        slot.num_speech += slot.num_drawn
        slot.ended = bool(drawn.status[i] != decode.RUNNING)
        if slot.step.num_draws:
            tokens = np.array(drawn.speech_tokens[i, : slot.num_drawn], np.int32)
            results[i] = Result(speech_tokens=tokens, status=decode.STATUS_NAMES[drawn.status[i]])
    return results


def generate(
    config: TextSpeechLmConfig,
    params: PyTree,
    requests: Sequence[Request],
    sampler: decode.Sampler,
    *,
    options: Mapping[str, int | float],
    seed: int = 0,
    stream: bool = False,
    ratio: Ratio | None = None,
    num_steps: int = 25,
    max_slots: int = 32,
    impl: str = "xla",
) -> list[Result]:
    """Speech tokens of any number of requests, at most `max_slots` at once, in their order.

    `stream` lays them out as if their text arrived, in groups of `ratio` (by default the config's), else the whole text
    comes first. Request i draws with fold_in(key(seed), i), whatever else is in the list. Params are those of training,
    scanned or not; the caller sets the mesh and `axis_rules`, if any. Other arguments as `Streams`. UserError, before
    anything is decoded, as its `open`.
    """
    config = dataclasses.replace(config, mix_ratio=ratio or config.ratio)
    defaults = sampler.row(options)
    for request in requests:
        _Slot(config, request, stream).flush()
        _options(sampler, defaults, request)
    num_slots = min(max_slots, 1 << max(len(requests) - 1, 0).bit_length())  # few batch sizes to compile
    params = decode.decoder_params(config, params)
    settings = {"num_slots": num_slots, "num_steps": num_steps, "arriving": stream, "impl": impl}
    streams = Streams(config, params, sampler, options=options, **settings)
    pieces: list[list[Result]] = [[] for _ in requests]
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
    return [Result(speech_tokens=np.concatenate([r.speech_tokens for r in p]), status=p[-1].status) for p in pieces]
