"""What is asked of the engine, and what each mode makes of it: which tensors which stage gets (spec/official.md 2.4).

    mode            text of the prompt        speech of the prompt   flow
    zero_shot       what the recording says   the recording          the recording
    cross_lingual   none                      none                   the recording
    instruct        the instruction           none                   the recording
    speaker         none, or the speaker      none                   the embedding alone
    conversion      no language model: the source's speech tokens    the recording

A long text is split where clauses end, and each piece is a request of its own to the language model and to the flow, as
upstream. The vocoder reads the mel of all pieces as one utterance, so at their seams phase and filters simply go on.
"""

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cv2jax.config import UserError
from cv2jax.shapes import Float, Integer
from cv2jax.synthesis.speed import check_speed
from cv2jax.synthesis.voice import Voice
from cv2jax.text.normalize import normalize_text
from cv2jax.text.split import is_speechless, normalize_and_split, split_paragraph
from cv2jax.text.tags import build_instruct_prefix, build_speaker_prefix, check_tags
from cv2jax.text.tokenizer import TextTokenizer

MODES = ("zero_shot", "cross_lingual", "instruct", "speaker", "conversion")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One thing to say.

    Attributes:
      voice: who speaks. mode: one of MODES. text: what; the first of it where more arrives. arriving: more text is pushed.
      instruct: how, in mode instruct. speaker: the name that a multi-speaker model knows, in mode speaker; "": the voice's.
      source: what to convert, a waveform at the tokenizer's rate, or `source_tokens`, its speech tokens [L].
      seed: same seed, same draws, alone or beside others. speed: 2 is twice as fast.
      sampling: temperature, top_p, top_k; what is missing is the engine's. min_length, max_length: speech tokens of a piece.
      offline: the flow hears each piece whole, as upstream's offline synthesis: its first sound comes behind its last token.
      language: code of the text; "": detected. name: what errors call the request.
    """

    voice: Voice
    text: str = ""
    mode: str = "zero_shot"
    arriving: bool = False
    instruct: str = ""
    speaker: str = ""
    source: Float[np.ndarray, " W"] | None = None
    source_tokens: Integer[np.ndarray, " L"] | None = None
    seed: int = 0
    speed: float = 1.0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    min_length: int | None = None
    max_length: int | None = None
    offline: bool = False
    language: str = ""
    name: str = "request"

    def check(self) -> None:
        """Raises UserError, in one line, for a mode that lacks something or has no use for something, and for wrong types."""
        self._check_types()
        if self.mode not in MODES:
            raise UserError(f"{self.name}: mode '{self.mode}': choose one of {', '.join(MODES)}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"{self.name}: seed {self.seed}: give a whole number from 0 to {(1 << 32) - 1}")
        check_speed(self.speed)
        converts, has_source = self.mode == "conversion", self.source is not None or self.source_tokens is not None
        if converts and self.arriving:
            raise UserError(
                f"{self.name}: a source cannot be converted while it arrives, since the speech tokenizer looks both ways;"
                " give it whole: what is heard of it still comes hop by hop"
            )
        if converts and not has_source:
            raise UserError(f"{self.name}: mode conversion needs a recording to convert; give a source")
        if not converts and has_source:
            raise UserError(f"{self.name}: mode {self.mode} speaks a text; for the source choose mode conversion")
        if converts and self.text:
            raise UserError(f"{self.name}: mode conversion has no text; leave it out, or choose another mode")
        drawn = {"min_length": self.min_length, "max_length": self.max_length, "sampling": self.sampling or None}
        unused = [name for name, value in (drawn | {"language": self.language or None}).items() if value is not None]
        if converts and unused:
            raise UserError(
                f"{self.name}: mode conversion reads no text and draws no tokens; leave {', '.join(unused)} out"
            )
        if self.arriving and self.language:
            raise UserError(
                f"{self.name}: language {self.language}: text that arrives is read as it is; leave language out, or give the"
                " text whole"
            )
        if bool(self.instruct) != (self.mode == "instruct"):
            mend = "give an instruction" if self.mode == "instruct" else "choose mode instruct, or leave it out"
            raise UserError(f"{self.name}: mode {self.mode} and instruction '{self.instruct[:40]}': {mend}")
        if self.speaker and self.mode != "speaker":
            raise UserError(f"{self.name}: a speaker's name belongs to mode speaker, not {self.mode}")
        if self.mode != "speaker" and not len(self.voice.speech_tokens):
            raise UserError(
                f"{self.name}: mode {self.mode} needs a voice with a recording, {self.voice.name} has none;"
                " enroll one or choose mode speaker"
            )
        if self.mode == "zero_shot" and not self.voice.text.strip():
            raise UserError(
                f"{self.name}: mode zero_shot needs what the recording of {self.voice.name} says; enroll it with --text, or"
                " choose mode cross_lingual"
            )

    def _check_types(self) -> None:
        """What only a caller from Python can get wrong."""
        for name in ("mode", "text", "instruct", "speaker", "language", "name"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise UserError(f"{self.name}: {name} is {_kind(value)}; give a str")
        for name in ("seed", "min_length", "max_length"):
            value = getattr(self, name)
            if not (_is_number(value, numbers.Integral) or (value is None and name != "seed")):
                raise UserError(f"{self.name}: {name} {value!r}: give a whole number")
        if not _is_number(self.speed, numbers.Real):
            raise UserError(f"{self.name}: speed {self.speed!r}: give a number")
        if not isinstance(self.voice, Voice):
            raise UserError(f"{self.name}: voice is {_kind(self.voice)}; give what `load_voice` returns")
        if not isinstance(self.sampling, Mapping):
            raise UserError(f"{self.name}: sampling is {_kind(self.sampling)}; give a mapping")


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def make_prompt_text(request: Request, *, normalizer: str, prefix: str) -> str:
    """What the language model reads in front of the text; `prefix` "speaker": its training always had a speaker there.

    Raises UserError for an instruction or a speaker's name that cannot stand there.
    """
    if request.mode == "zero_shot":
        return _normalize(request.voice.text, request.voice.language, normalizer)
    if request.mode == "instruct":
        return build_instruct_prefix(request.instruct)
    if request.mode == "speaker" and (request.speaker or prefix == "speaker"):
        return build_speaker_prefix(request.speaker or request.voice.name)
    return build_speaker_prefix(None) if prefix == "speaker" else ""


def make_pieces(request: Request, tokenizer: TextTokenizer, *, normalizer: str) -> list[str]:
    """The text in pieces, ready for the tokenizer; `normalizer` as in `normalize_text`, "": it stays as it is.

    Raises UserError for text with nothing to speak, misplaced tags, and half of a surrogate pair.
    """
    check_tags(request.text)
    count: Callable[[str], int] = lambda text: len(tokenizer.encode(text))  # noqa: E731
    language = request.language or None
    if normalizer:
        pieces = normalize_and_split(request.text, count, language=language, normalizer=normalizer)
    else:
        pieces = split_paragraph(request.text.strip(), count, language=language) if request.text.strip() else []
    pieces = [piece for piece in pieces if not is_speechless(piece)]
    if not pieces:
        shown = f"'{request.text[:20]}'" if request.text.strip() else "it is empty"
        raise UserError(f"{request.name}: the text has nothing to speak ({shown}); give it some words")
    return pieces


def _normalize(text: str, language: str, normalizer: str) -> str:
    return normalize_text(text, language=language or None, normalizer=normalizer) if normalizer else text
