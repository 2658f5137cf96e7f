"""Speech from requests, any number at once, by the stages of one model.

Nothing runs by itself: `advance` does one piece of work, a dispatch of the language model for all sessions together or one
hop of one session through flow and vocoder. Which comes first is told by how much sound each session has, so that who has none
is served before who has some. What a session says depends on none of that, nor on the others: it draws with its own keys.
"""

import functools
import time
from collections import OrderedDict
from collections.abc import Iterable

import jax
import numpy as np

from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.shapes import Float32, Int32
from cv2jax.synthesis.mel_stream import NEVER_STREAMS, MelStreams, SolvedVoice
from cv2jax.synthesis.mel_whole import WholeMels
from cv2jax.synthesis.pieces import Piece
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.prompt import Prompt, check_tokens
from cv2jax.synthesis.request import Request, make_pieces, make_prompt_text
from cv2jax.synthesis.result import STAGES, Result
from cv2jax.synthesis.sampling import SamplingOptions
from cv2jax.synthesis.session import Prepared, Session, StartMel, make_speech_request
from cv2jax.synthesis.speech_stream import MIN_RATIO, SpeechStreams
from cv2jax.synthesis.stages import TOKENS_PER_SECOND, Stages, TokenizerStage
from cv2jax.synthesis.voice import Voice, require_voice
from cv2jax.synthesis.wave_stream import WaveStreams
from cv2jax.text.layout import row_length
from cv2jax.text.tokenizer import TextTokenizer

_NONE = np.zeros(0, np.int32)


class Engine:
    """All requests of one model. It is of one thread: whoever iterates a session, or calls `advance`."""

    def __init__(
        self,
        stages: Stages,
        tokenizer: TextTokenizer,
        *,
        mask: ChunkMask = ChunkMask(chunk=25),
        plan: HopPlan = HopPlan(),
        sampling: SamplingOptions = SamplingOptions(),
        num_slots: int = 4,
        max_voices: int = 2,
        normalizer: str = "auto",
        hop_sizes: tuple[int, ...] = (),
    ) -> None:
        """Makes the caches; compiles nothing yet (`warm_up` does).

        Args:
          mask: of the flow, in tokens. sampling: of requests that do not say themselves. num_slots: requests that the language
            model serves at once; further ones wait. max_voices: whose solved recordings are kept, the last used.
          normalizer: as in `normalize_text`, "": texts stay as they are. hop_sizes: as in `MelStreams`.

        Raises UserError for stages that do not belong together, and for a plan, mask, options or counts that cannot be. A mask
        without chunks serves offline requests alone.
        """
        plan.validate()
        for name, number in (("num_slots", num_slots), ("max_voices", max_voices)):
            if number < 1:
                raise UserError(f"{name}={number}: the engine needs 1 or more; give that many")
        _require_fitting(stages, tokenizer)
        self.stages, self.tokenizer, self._plan, self._normalizer = stages, tokenizer, plan, normalizer
        self._mels = None
        if mask.chunk < NO_CHUNK:
            self._mels = MelStreams(stages.mel, mask, hop_sizes=hop_sizes, max_kept=num_slots)
        self.waves = WaveStreams(stages.wave)
        self._speech: SpeechStreams | None = None
        if stages.speech is not None:
            self._speech = SpeechStreams(
                stages.speech, options=stages.speech.sampler.options(sampling), num_slots=num_slots
            )
        self._num_slots = num_slots
        self._sessions: list[Session] = []
        self._holders: dict[int, tuple[Session, Piece]] = {}  # by slot
        self._voices: OrderedDict[str, SolvedVoice] = OrderedDict()  # by digest
        self._bare: OrderedDict[str, SolvedVoice] = OrderedDict()  # without the recording, for mode speaker
        self._max_voices = max_voices

    @property
    def mels(self) -> MelStreams:
        """The flow of requests that are streamed; UserError where its mask has no chunks."""
        if self._mels is None:
            raise UserError(NEVER_STREAMS)
        return self._mels

    @functools.cached_property
    def wholes(self) -> WholeMels:
        """The flow of requests that are heard offline; UserError where the stage only streams."""
        return WholeMels(self.stages.mel)

    @property
    def num_slots(self) -> int:
        """Requests that the language model serves at once."""
        return self._num_slots

    @property
    def num_open(self) -> int:
        """Sessions that have not ended."""
        return len(self._sessions)

    def open(self, request: Request) -> Session:
        """Takes a request; work on it begins with the next `advance`.

        UserError, in one line, for a request that cannot be (`Request.check`), a voice of another model, text with nothing to
        speak or too long, and a source that cannot be converted.
        """
        times, begun = [], time.perf_counter()
        request.check()
        start_mel = self._make_start(request)
        times.append(time.perf_counter())
        source = self._tokenize(request) if request.mode == "conversion" else None
        times.append(time.perf_counter())
        prepared = self._prepare(request, start_mel, source)
        times.append(time.perf_counter())
        mels = self.wholes if request.offline else self.mels
        session = Session(self, prepared, (mels, self.waves), self._plan, begun)
        session.seconds |= dict(zip(STAGES, np.diff([begun, *times]).tolist(), strict=False))
        if request.arriving and request.text:
            session.push_text(request.text)
        self._sessions.append(session)
        return session

    def enroll(self, voice: Voice, *, with_recording: bool = True) -> SolvedVoice:
        """The voice with its recording solved by the flow; kept for the next requests. UserError where it does not fit."""
        voice.check()
        kept, digest = self._voices if with_recording else self._bare, voice.digest
        if digest not in kept:
            prompt = self._make_prompt(voice, with_recording=with_recording)
            while len(kept) >= self._max_voices:
                kept.popitem(last=False)
            kept[digest] = self.mels.enroll(prompt)
        kept.move_to_end(digest)
        return kept[digest]

    def _make_prompt(self, voice: Voice, *, with_recording: bool) -> Prompt:
        mel = self.stages.mel
        voice.check()
        facts = {"speech_tokenizer": mel.speech_tokenizer, "speaker_encoder": mel.speaker_encoder}
        require_voice(voice, mel=mel.mel_definition, **facts)
        recording = {"speech_tokens": voice.speech_tokens, "mel": voice.mel} if with_recording else {}
        key = jax.random.key(voice.seed)
        return Prompt(speaker_embedding=voice.speaker_embedding, key=key, name=voice.name, **recording)

    def _make_start(self, request: Request) -> StartMel:
        """What opens the flow for each piece of the request."""
        with_recording = request.mode != "speaker"
        if request.offline:
            prompt = self._make_prompt(request.voice, with_recording=with_recording)
            return functools.partial(self.wholes.start, self.wholes.enroll(prompt))
        return functools.partial(self.mels.start, self.enroll(request.voice, with_recording=with_recording))

    def warm_up(self, voice: Voice, seconds: float = 10.0) -> None:
        """Compiles what requests of this voice, up to so many seconds long, need of all stages."""
        solved, num_tokens = self.enroll(voice), round(TOKENS_PER_SECOND * seconds)
        self.mels.warm_up(solved, num_tokens)
        self.waves.warm_up()
        if self._speech is not None:
            num_text = len(self.tokenizer.encode(voice.text)) + num_tokens // MIN_RATIO
            self._speech.warm_up(int(row_length(num_text, len(voice.speech_tokens) + num_tokens)))

    def advance(self) -> bool:
        """Does one piece of work; False where there is none: all sessions wait for text, or have ended."""
        before = self.num_open
        self._give_slots()
        if self.num_open < before:
            return True  # one was refused: its slot is free
        hops = [(session, hop) for session in self._sessions if (hop := session.next_hop()) is not None]
        ready = min(hops, key=lambda pair: pair[0].num_samples, default=None)
        missing = {session: number for session in self._sessions if (number := session.num_missing()) is not None}
        if ready is not None and all(ready[0].num_samples <= session.num_samples for session in missing):
            ready[0].make_hop(*ready[1])
            return True
        # No more than who waits for the fewest: its hop comes next.
        if self._draw(min(missing.values(), default=None)):
            return True
        if ready is not None:
            ready[0].make_hop(*ready[1])
        return ready is not None

    def speak(self, request: Request) -> tuple[Float32[np.ndarray, " W"], Result]:
        """(waveform, result) of a request, of which no more text comes: the frames of its session behind one another.

        UserError as `open`, and where requests that wait for text hold all slots: it is cancelled then.
        """
        with self.open(request) as session:
            session.flush()
            frames = [frame.samples for frame in session]
        return np.concatenate([np.zeros(0, np.float32), *frames]), session.result

    def release(self, session: Session) -> None:
        """Lets go of a session that has ended, and of its slot."""
        for slot in [slot for slot, (holder, _) in self._holders.items() if holder is session]:
            self._free(slot)
        if session in self._sessions:
            self._sessions.remove(session)

    def _give_slots(self) -> None:
        """Free slots to pieces that have text, new text to those that have a slot.

        First to who has made the least sound, of equals to who came first: a long text does not keep the others waiting.
        """
        if self._speech is None:
            return
        for session in sorted(self._sessions, key=lambda session: session.num_samples):
            piece = session.piece_to_draw()
            free = self._speech.free
            if piece is not None and free:
                request, key = session.open_piece(piece)
                try:
                    self._speech.open(free[0], request, key, flushed=piece.closed, arriving=session.request.arriving)
                except UserError as error:
                    session.finish("failed", str(error))
                    continue
                piece.slot, piece.flushed = free[0], piece.closed
                self._holders[free[0]] = session, piece
        for slot, (session, piece) in list(self._holders.items()):
            try:
                if piece.ids:
                    self._speech.push_text(slot, np.array(piece.take_ids(), np.int32))
                if piece.closed and not piece.flushed:
                    piece.flushed = True
                    self._speech.flush(slot)
            except UserError as error:
                session.finish("failed", str(error))

    def _draw(self, limit: int | None) -> bool:
        """One dispatch of the language model; whether anything was drawn."""
        if self._speech is None or not self._holders:
            return False
        start = time.perf_counter()
        results, holders = self._speech.advance(limit), dict(self._holders)
        seconds = time.perf_counter() - start
        for slot, (session, piece) in holders.items():
            if slot not in results:
                piece.is_idle = True
                continue
            session.seconds["lm"] += seconds
            session.add_drawn(piece, results[slot])
            if piece.is_drawn and slot in self._holders:
                self._free(slot)
        return bool(results)

    def _free(self, slot: int) -> None:
        assert self._speech is not None
        self._speech.close(slot)
        _, piece = self._holders.pop(slot)
        piece.slot = None

    def _prepare(self, request: Request, start_mel: StartMel, source: Int32[np.ndarray, " L"] | None) -> Prepared:
        if source is not None:
            return Prepared(
                request=request, start_mel=start_mel, prompt_text=_NONE, prompt_speech=_NONE, pieces=[], source=source
            )
        speech, encode = self.stages.speech, self.tokenizer.encode
        if self._speech is None or speech is None:
            raise UserError(f"{request.name}: this model has no language model, it can only convert")
        prompt = make_prompt_text(request, normalizer=self._normalizer, prefix=speech.prefix)
        pieces = [] if request.arriving else make_pieces(request, self.tokenizer, normalizer=self._normalizer)
        speaks = request.mode == "zero_shot"
        prepared = Prepared(
            request=request,
            start_mel=start_mel,
            prompt_text=np.array(encode(prompt), np.int32),
            prompt_speech=np.asarray(request.voice.speech_tokens, np.int32) if speaks else _NONE,
            pieces=[encode(piece) for piece in pieces],
        )
        # What the language model would refuse is refused before anything is drawn; of arriving text one token stands for all.
        for ids in prepared.pieces or [[0]]:
            self._speech.check(make_speech_request(prepared, ids))
        return prepared

    def _tokenize(self, request: Request) -> Int32[np.ndarray, " L"]:
        """The speech tokens of what is to be converted."""
        if request.source_tokens is not None:
            tokens = np.asarray(request.source_tokens, np.int32)
        else:
            tokens = _tokenize_source(self.stages.tokenizer, request)
        check_tokens(tokens, self.stages.mel, f"{request.name}, source")
        if not len(tokens):
            raise UserError(f"{request.name}: the source has no speech tokens; give a longer recording")
        return tokens


def _tokenize_source(stage: TokenizerStage | None, request: Request) -> Int32[np.ndarray, " L"]:
    source = np.asarray(request.source, np.float32)
    if stage is None:
        raise UserError(f"{request.name}: this model has no speech tokenizer to convert with; add its run to the model")
    if source.ndim != 1 or not np.all(np.isfinite(source)):
        raise UserError(f"{request.name}: the source must be one row of finite samples")
    if len(source) > stage.max_seconds * stage.rate_hz:
        raise UserError(
            f"{request.name}: the source lasts {len(source) / stage.rate_hz:.1f} s, the tokenizer reads {stage.max_seconds:g} s"
            " at most; cut it"
        )
    return np.asarray(stage.tokenize(source), np.int32)


def _require_fitting(stages: Stages, tokenizer: TextTokenizer) -> None:
    """Raises UserError for stages of different models."""
    mel, speech = stages.mel, stages.speech
    if mel.mel_definition != stages.wave.mel_definition:
        raise UserError(
            f"flow and vocoder: the mel of one ({mel.mel_definition}) is not that of the other"
            f" ({stages.wave.mel_definition}); take stages that were trained on the same"
        )
    if mel.num_mels != mel.mel_definition.num_mels:
        raise UserError(f"flow: makes {mel.num_mels} mel bins, its definition has {mel.mel_definition.num_mels}")
    parts: Iterable[tuple[str, str]] = [("flow", mel.speech_tokenizer)]
    if speech is not None:
        if speech.num_speech_tokens != mel.num_speech_tokens:
            raise UserError(
                f"language model and flow: {speech.num_speech_tokens} and {mel.num_speech_tokens} speech tokens; take stages"
                " that learnt from the same tokenizer"
            )
        if tokenizer.vocabulary_size > speech.text_vocabulary_size:
            raise UserError(
                f"the text tokenizer has {tokenizer.vocabulary_size} tokens, the language model"
                f" {speech.text_vocabulary_size}; take the tokenizer that it was trained with"
            )
        parts = [*parts, ("language model", speech.speech_tokenizer)]
    if stages.tokenizer is not None:
        parts = [*parts, ("speech tokenizer", stages.tokenizer.hash)]
    known = {name: value for name, value in parts if value}
    if len(set(known.values())) > 1:
        shown = ", ".join(f"{name} {value[:12]}" for name, value in known.items())
        raise UserError(f"the stages know different speech tokenizers ({shown}); take stages that learnt from the same")
