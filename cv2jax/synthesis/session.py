"""One request on its way through the engine: its pieces, its streams, the frames that are ready, and what came of it.

Whoever iterates a session drives the engine, and with it all other sessions: there are no threads, and nothing polls. A
session whose text is still arriving stops the iteration where it waits for text; push some, and iterate again.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK
from cv2jax.shapes import Float32, Int32, Key
from cv2jax.synthesis.arriving import ArrivingPieces
from cv2jax.synthesis.mel_stream import MelStream, MelStreams
from cv2jax.synthesis.mel_whole import WholeMel, WholeMels
from cv2jax.synthesis.pieces import Piece, Pieces
from cv2jax.synthesis.plan import HopPlan, Pace
from cv2jax.synthesis.prompt import NonFinite
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.result import STAGES, Pcm, Result
from cv2jax.synthesis.speech_stream import SpeechRequest, SpeechResult
from cv2jax.synthesis.speed import SpeedChanger
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, LOOKAHEAD
from cv2jax.synthesis.wave_stream import WaveStreams
from cv2jax.text import incremental
from cv2jax.text.tags import TagState, check_more_tags, check_tags_closed

if TYPE_CHECKING:
    from cv2jax.synthesis.engine import Engine

StartMel = Callable[[Key[Array, ""], str], MelStream | WholeMel]  # (key, name of the request) → a piece in its voice
Streams = tuple[MelStreams | WholeMels, WaveStreams]
_HEARD = ("ok", "hit_limit")  # all of the request is sound
_FOR_SPEECH, _FOR_MEL, _FOR_WAVE = range(3)  # folded into a request's key: no two stages share draws


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A request as its session needs it: the prompts of each stage and all text that is there."""

    request: Request
    start_mel: StartMel
    prompt_text: Int32[np.ndarray, " T"]
    prompt_speech: Int32[np.ndarray, " P"]
    pieces: list[list[int]]  # text tokens; of arriving text none
    source: Int32[np.ndarray, " L"] | None = None


def make_speech_request(prepared: Prepared, text: list[int]) -> SpeechRequest:
    """What the language model is asked for these text tokens."""
    request = prepared.request
    return SpeechRequest(
        text_tokens=np.array(text, np.int32),
        prompt_text_tokens=prepared.prompt_text,
        prompt_speech_tokens=prepared.prompt_speech,
        options=request.sampling,
        min_length=request.min_length,
        max_length=request.max_length,
        name=request.name,
    )


class Session:
    """A request on its way; `Engine.open` makes it. An iterator of `Pcm`."""

    def __init__(
        self,
        engine: "Engine",
        prepared: Prepared,
        streams: Streams,
        plan: HopPlan,
        begun: float,
    ) -> None:
        self._engine, self._prepared, self._begun = engine, prepared, begun
        self.request = request = prepared.request
        self._mels, waves = streams
        key = jax.random.key(request.seed)
        self._speech_key, self._mel_key, self._wave_key = (
            jax.random.fold_in(key, stage) for stage in (_FOR_SPEECH, _FOR_MEL, _FOR_WAVE)
        )
        self._waves, self._wave, definition = waves, waves.start(self._wave_key), waves.stage.mel_definition
        self._rate, per_token = definition.rate_hz, FRAMES_PER_TOKEN * definition.mel_hop
        paced = {"chunk": self._mels.mask.chunk, "hold_back": waves.hold_back / per_token, "speed": request.speed}
        self._make_pace = functools.partial(Pace, plan, **paced)
        self._pace = self._make_pace()
        self._mel: MelStream | WholeMel | None = None
        self._speed = SpeedChanger(request.speed)
        self._frames: deque[Pcm] = deque()
        self._text, self._tags = ArrivingPieces(lambda text: len(engine.tokenizer.encode(text))), TagState()
        self._incremental, self._flushed = incremental.init_incremental(), not request.arriving
        self.pieces, self.num_samples = Pieces(prepared.pieces), 0
        if prepared.source is not None:
            self._append_drawn(prepared.source.tolist())
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._first_audio: float | None = None
        self._status, self._message, self._end = "running", "", 0.0
        self._limited = False
        self._silent: int | None = None  # number of the first piece that says nothing

    def _append_drawn(self, tokens: list[int]) -> None:
        piece = self.pieces.append([], closed=True)
        piece.tokens, piece.is_drawn, piece.flushed = tokens, True, True

    # ---- for the caller

    @property
    def ended(self) -> bool:
        """Whether no more sound is made; some may still wait to be taken."""
        return self._status != "running"

    @property
    def result(self) -> Result:
        """What came of it so far."""
        num_text, num_speech, num_pieces = self.pieces.counts
        return Result(
            status=self._status,
            message=self._message,
            mode=self.request.mode,
            voice=self.request.voice.name,
            seed=self.request.seed,
            num_text_tokens=num_text,
            num_speech_tokens=num_speech,
            num_pieces=num_pieces,
            num_samples=self.num_samples,
            rate_hz=self._rate,
            seconds=dict(self.seconds),
            first_audio=self._first_audio,
            total=(self._end or time.perf_counter()) - self._begun,
        )

    def push_text(self, text: str) -> None:
        """Appends to the text of a request whose text is arriving; tokens are drawn once there are enough.

        UserError, and nothing is appended, where the text was whole from the start or has ended, for broken Unicode and for
        misplaced tags, also where pushes cut them. What comes to a session that has ended (cancelled, failed) is dropped.
        """
        if not self.request.arriving:
            raise UserError(f"{self.request.name}: its text was whole from the start; open it as arriving to push more")
        if self._flushed:
            raise UserError(f"{self.request.name}: text behind its end; open another request")
        if self.ended:
            return
        self._engine.tokenizer.normalize(text)  # refuses broken Unicode
        self._tags = check_more_tags(self._tags, text)
        self._append(self._text.push(text))

    def end_piece(self) -> None:
        """Says that what was pushed so far is to be heard to its end without waiting for more, as a line that is complete.

        What is pushed behind it is spoken as an utterance of its own. What has nothing to speak is dropped.
        """
        if self._flushed or self.ended:
            return
        self._append(self._text.end())
        newest = self.pieces.newest
        if newest is not None and self.pieces.heard is None and not newest.ends_utterance:
            self._append_drawn([])  # all is heard, but for what the vocoder holds back
        if self.pieces.newest is not None:
            self.pieces.newest.ends_utterance = True

    def flush(self) -> None:
        """Says that no more text comes.

        UserError where there was nothing to speak or a span is open, and the request may get some text still.
        """
        if self._flushed or self.ended:
            return
        check_tags_closed(self._tags)
        self._append(self._text.flush())
        if self.pieces.newest is None:
            raise UserError(f"{self.request.name}: the text has nothing to speak; give it some words")
        if not self.pieces.newest.closed:
            self._close_piece(self.pieces.newest)
        self._flushed = True

    def cancel(self) -> None:
        """Ends the request where it stands, also before its first frame; what is ready is dropped."""
        dropped = bool(self._frames)
        self._frames.clear()
        if not self.ended:
            self.finish("cancelled")
        elif dropped and self._status in _HEARD:
            self._status = "cancelled"

    def __enter__(self) -> "Session":
        """Itself; at the end of the block it is cancelled, unless it has ended and all was taken."""
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def take(self) -> list[Pcm]:
        """The frames that are ready, without driving the engine."""
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def __iter__(self) -> Iterator[Pcm]:
        """Itself."""
        return self

    def __next__(self) -> Pcm:
        """The next frame, for which it drives the engine; stops at the end, and where the request waits for text.

        UserError where others keep it from going on: all slots are theirs, and they wait for text. It may go on later.
        """
        while not self._frames:
            if self.ended or self.waits:
                raise StopIteration
            if not self._engine.advance() and not (self.ended or self.waits):
                raise UserError(
                    f"{self.request.name}: all {self._engine.num_slots} slots are held by requests that wait for text; push"
                    " it, flush or cancel them, or make the engine with more num_slots"
                )
        return self._frames.popleft()

    def _append(self, parts: list[tuple[str, bool]]) -> None:
        start = time.perf_counter()
        for text, ends in parts:
            piece = self.pieces.newest
            if piece is None or piece.closed:
                piece = self.pieces.append([], closed=False)
            self._incremental, ids = incremental.push(self._engine.tokenizer, self._incremental, text)
            piece.add(ids)
            if ends:
                self._close_piece(piece)
        self.seconds["text"] += time.perf_counter() - start

    def _close_piece(self, piece: Piece) -> None:
        piece.add(incremental.flush(self._engine.tokenizer, self._incremental))
        self._incremental, piece.closed = incremental.init_incremental(), True

    # ---- for the engine

    @property
    def waits(self) -> bool:
        """Whether only more text, or its end, moves it on."""
        if self.ended or self._flushed or self.next_hop() is not None:
            return False
        has_none = lambda piece: piece.slot is None and not (piece.ids or piece.closed)  # noqa: E731
        return all(piece.is_drawn or piece.is_idle or has_none(piece) for piece in self.pieces)

    def piece_to_draw(self) -> Piece | None:
        """The piece that the language model is to get next: one has it at a time, and it may be ahead of what is heard."""
        piece = next((piece for piece in self.pieces if not piece.is_drawn), None)
        return piece if piece is not None and piece.slot is None and (piece.ids or piece.closed) else None

    def open_piece(self, piece: Piece) -> tuple[SpeechRequest, Key[Array, ""]]:
        """(what the language model is asked for the piece, the key of its draws)."""
        key = jax.random.fold_in(self._speech_key, piece.number)
        return make_speech_request(self._prepared, piece.take_ids()), key

    def add_drawn(self, piece: Piece, result: SpeechResult) -> None:
        """Takes what the language model drew for a piece."""
        piece.tokens += result.speech_tokens.tolist()
        piece.is_drawn = result.status != "running"
        self._limited |= result.status == "hit_limit"
        if piece.is_drawn and not piece.tokens and self._silent is None:
            self._silent = piece.number
        if result.status == "non_finite":
            self.finish(
                "non_finite", f"{self.request.name}: the language model's scores are not finite; check the checkpoint"
            )

    def num_missing(self) -> int | None:
        """Speech tokens until the next hop; None where it waits for no draws."""
        piece = self.pieces.heard
        if self.ended or piece is None or piece.is_drawn or piece.is_idle or piece.slot is None:
            return None
        missing = self._hop_size(piece) + LOOKAHEAD - (len(piece.tokens) - piece.num_used)
        return missing if missing > 0 else None

    def next_hop(self) -> tuple[int, bool] | None:
        """(tokens of the hop that can be made now, whether it ends its piece); None where there is none."""
        if self.ended:
            return None
        piece = self.pieces.heard
        if piece is None:
            return (0, True) if self._flushed else None  # the end of what the vocoder holds back
        there = len(piece.tokens) - piece.num_used
        if (
            there > LOOKAHEAD and there >= (size := self._hop_size(piece)) + LOOKAHEAD
        ):  # a queued request takes no memory
            return size, False
        return (there, True) if piece.is_drawn else None

    def make_hop(self, size: int, ends: bool) -> None:
        """Makes the hop that `next_hop` has found: mel, waveform, a frame for the caller."""
        try:
            start = time.perf_counter()
            piece = self.pieces.heard
            mel = self._hear(size, ends)
            last = ends and self._flushed and self.pieces.heard is None
            middle = time.perf_counter()
            samples = self._wave.hop(mel, last=last or (ends and piece is not None and piece.ends_utterance))
            end = time.perf_counter()
        except NonFinite as error:
            return self.finish("non_finite", str(error))
        except UserError as error:
            return self.finish("failed", str(error))
        self.seconds["flow"] += middle - start
        self.seconds["vocoder"] += end - middle
        if len(samples):
            self._frames.append(Pcm(samples=samples, first_sample=self.num_samples))
            self.num_samples += len(samples)
            if self._first_audio is None:
                self._first_audio = end - self._begun
        if self._wave.has_ended and not last:
            self._wave = self._waves.start(jax.random.fold_in(self._wave_key, self.pieces.num_heard))
            self._pace = self._make_pace()
        if last and self._silent is not None:
            place = f"piece {self._silent + 1} of {self.pieces.num}"
            self.finish("empty", f"{self.request.name}: {place}: nothing was drawn")
        elif last:
            self.finish("ok" if self.num_samples else "empty")

    def finish(self, status: str, message: str = "") -> None:
        """Ends the request; the engine frees its slot."""
        self._status = "hit_limit" if status == "ok" and self._limited else status
        self._message, self._end = message, time.perf_counter()
        self._mel = None
        self._engine.release(self)

    def _hop_size(self, piece: Piece) -> int:
        to_border = self._open_mel(piece).num_to_border()
        return to_border if to_border >= NO_CHUNK else self._pace.next_hop(to_border)

    def _open_mel(self, piece: Piece) -> MelStream | WholeMel:
        if self._mel is None:
            key = jax.random.fold_in(self._mel_key, piece.number)
            self._mel = self._prepared.start_mel(key, self.request.name)
        return self._mel

    def _hear(self, size: int, ends: bool) -> Float32[np.ndarray, "F M"]:
        """The mel of the next hop, at the request's speed; goes on to the next piece at the end of one."""
        mel, piece = np.zeros((0, self._mels.stage.num_mels), np.float32), self.pieces.heard
        if piece is None:
            return mel
        if size:
            at, behind = piece.num_used, piece.num_used + size
            tokens = np.array(piece.tokens[at : behind + LOOKAHEAD], np.int32)
            mel = self._open_mel(piece).hop(tokens[:size], None if ends else tokens[size:])
            piece.num_used = behind
            self._pace.add(size)
        mel = self._speed.push(mel, last=ends)
        if ends:
            self.pieces.leave()
            self._mel, self._speed = None, SpeedChanger(self.request.speed)
        return mel
