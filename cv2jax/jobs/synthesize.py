"""`cv2jax synthesize`: speech of a text, of text that arrives, or of a recording, to a file or to a pipe while it is made."""

import dataclasses
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np

from cv2jax.audio.io import encode_wav, load_waveform, to_int16
from cv2jax.config import UserError
from cv2jax.files import whole_file
from cv2jax.synthesis.engine import Engine
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.result import Pcm, Result
from cv2jax.synthesis.sampling import SamplingOptions
from cv2jax.synthesis.session import Session
from cv2jax.synthesis.voice import Voice, load_voice
from cv2jax.tasks.engine import EngineOptions, load_engine
from cv2jax.tasks.model_directory import find_voice

PIPE = "-"
WHOLE = ("ok", "hit_limit")  # what is written to a file: what was heard before a stage failed is not
_SOURCE_RATE_HZ = 16_000

ByteStream = io.BufferedIOBase | BinaryIO


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthesizeOptions:
    """Who speaks, and how."""

    voice: str = ""
    mode: str = ""  # as `Request`; "": by what is given
    instruct: str = ""
    speaker: str = ""
    source: str = ""  # recording to convert
    seed: int = 0
    offline: bool = False  # as `Request`
    speed: float = 1.0
    language: str = ""
    normalizer: str | None = None  # as `EngineOptions`
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    min_length: int | None = None
    max_length: int | None = None
    chunk: int | None = None  # as `EngineOptions`, and the next
    left: int | None = None
    real_time_factor: float = 0.5  # as `HopPlan`


def synthesize(
    model: str | os.PathLike[str],
    text: str | Iterable[str],
    out: str,
    options: SynthesizeOptions,
    *,
    on_open: Callable[[int], None] | None = None,
    on_frame: Callable[[Pcm, Session], None] | None = None,
) -> Result:
    """Speaks `text`, whole or piece by piece as it comes, to `out`: a .wav file, or PIPE for raw PCM to standard output.

    A piece that ends with a line break is heard to its end before the next one is waited for. A file is written whole or not
    at all, at the end, and only where the result is one of WHOLE; the pipe gets each frame, 16-bit little-endian mono, when it
    is made. `on_open` is told the samples a second, before the first frame, `on_frame` of each. Raises UserError for a model,
    voice, text or place that will not do, before anything is spoken; BrokenPipeError where nobody reads the pipe any more.
    """
    if out != PIPE:
        check_out(out)
    sampling, plan = options.sampling, HopPlan(real_time_factor=options.real_time_factor)
    plan.validate()
    voice = load_voice(find_voice(model, options.voice))
    request = make_request(voice, text, options)
    settings = {"chunk": options.chunk, "left": options.left, "normalizer": options.normalizer}
    engine_options = EngineOptions(sampling=sampling, plan=plan, **settings)
    engine_options.validate()
    engine = load_engine(model, engine_options)
    if on_open is not None:
        on_open(engine.stages.wave.mel_definition.rate_hz)
    pieces = iter(()) if isinstance(text, str) else iter(text)
    return speak(engine, request, pieces, out, on_frame)


def speak(
    engine: Engine,
    request: Request,
    pieces: Iterator[str],
    out: str,
    on_frame: Callable[[Pcm, Session], None] | None = None,
) -> Result:
    """`synthesize` with a loaded engine: the request, then the `pieces` of its text as they come."""
    session, frames = engine.open(request), []
    pipe = _open_pipe() if out == PIPE else None
    try:
        for frame in _frames(session, pieces):
            if pipe is None:
                frames.append(frame.samples)
            else:
                _send(pipe, frame)  # and is let go of: a pipe may go on for hours
            if on_frame is not None:
                on_frame(frame, session)
    finally:
        session.cancel()  # a pipe that broke, a text that cannot be: does nothing to what has ended
    result = session.result
    if pipe is None and result.status in WHOLE:
        write_whole(out, np.concatenate(frames), result.rate_hz)
    return result


def make_request(voice: Voice, text: str | Iterable[str], options: SynthesizeOptions) -> Request:
    """The request that the options ask for; UserError for a mode, voice or source that will not do."""
    arriving, mode = not isinstance(text, str), options.mode.replace("-", "_")
    if not mode:
        mode = _guess_mode(voice, options)
    converts = mode == "conversion"
    if converts and options.sampling != SamplingOptions():
        raise UserError("temperature, top_p, top_k: mode conversion draws no tokens; leave them out")
    if options.normalizer not in (None, "", "none") and (converts or arriving):
        why = "mode conversion reads no text" if converts else "text that arrives is read as it is"
        raise UserError(f"normalizer {options.normalizer}: {why}; leave it out" + ("" if converts else ", or --stream"))
    source = load_waveform(options.source, _SOURCE_RATE_HZ) if options.source else None
    request = Request(
        voice=voice,
        text=text if isinstance(text, str) else "",
        mode=mode,
        arriving=arriving,
        instruct=options.instruct,
        speaker=options.speaker,
        source=source,
        seed=options.seed,
        offline=options.offline,
        speed=options.speed,
        min_length=options.min_length,
        max_length=options.max_length,
        language=options.language,
    )
    request.check()
    return request


def _guess_mode(voice: Voice, options: SynthesizeOptions) -> str:
    if options.source:
        return "conversion"
    if options.instruct:
        return "instruct"
    if options.speaker or not len(voice.speech_tokens):
        return "speaker"
    return "zero_shot" if voice.text.strip() else "cross_lingual"


def _frames(session: Session, pieces: Iterator[str]) -> Iterator[Pcm]:
    """The frames; of arriving text all that can be heard of a piece comes before the next one is waited for."""
    if session.request.arriving:
        for piece in pieces:
            is_line = piece.endswith("\n")
            session.push_text(piece.rstrip() if is_line else piece)  # the end of a line is no text to speak
            if is_line:
                session.end_piece()
            yield from session
        session.flush()
    yield from session


def _open_pipe() -> ByteStream | io.RawIOBase:
    """Standard output without its buffer, which would try to write again, at the exit, what could not be written."""
    return getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)


def _send(pipe: ByteStream | io.RawIOBase, frame: Pcm) -> None:
    """Writes a frame; UserError where there is no room for it, BrokenPipeError where nobody reads it."""
    rest = memoryview(to_int16(frame.samples).astype("<i2").tobytes())
    try:
        while rest:
            rest = rest[pipe.write(rest) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"--out {PIPE}: standard output cannot be written ({error.strerror or error})") from None


def read_lines(stream: ByteStream) -> Iterator[str]:
    """The lines of a stream, each when it is there; UserError for bytes that are no UTF-8."""
    for number, line in enumerate(iter(stream.readline, b""), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input: line {number}, byte {error.start + 1}: no UTF-8; convert the text"
            ) from None


def check_out(path: str) -> None:
    """Raises UserError unless a .wav can be written there."""
    place = pathlib.Path(path)
    if place.suffix.lower() != ".wav" or place.is_dir():
        raise UserError(f"--out {path}: give a file that ends in .wav, or - for raw PCM to standard output")
    # Folders on the way are made with the file, not for a model that is not there.
    there = next(folder for folder in place.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give another file") from None


def write_whole(path: str, waveform: np.ndarray, rate_hz: int) -> None:
    """A .wav that is there whole or not at all; UserError where it cannot be written."""
    with whole_file(path, f"--out {path}: cannot be written ({{reason}}); give another file") as file:
        file.write(encode_wav(waveform, rate_hz))


def format_result(result: Result) -> str:
    """The result in one line."""
    head = f"{result.status}: {result.audio_seconds:.2f} s of speech, {result.num_speech_tokens} speech tokens"
    pieces = f" in {result.num_pieces} pieces" if result.num_pieces > 1 else ""
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.seconds.items())
    if result.first_audio is None or result.real_time_factor is None:
        return f"{head}{pieces}; no sound; {stages}" + (f"; {result.message}" if result.message else "")
    speed = f"first audio after {result.first_audio:.2f} s, real-time factor {result.real_time_factor:.2f}"
    return f"{head}{pieces}; {speed}; {stages}" + (f"; {result.message}" if result.message else "")
