"""What a request gives: sound in frames, and what came of it."""

import dataclasses

import numpy as np

from cv2jax.shapes import Float32

# Seconds of a result are told of these. voice: the recording is solved, where no earlier request did; tokenizer: of a source.
STAGES = ("voice", "tokenizer", "text", "lm", "flow", "vocoder")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pcm:
    """Some sound: samples [W] in [-0.99, 0.99], the first of which is number `first_sample` of the request."""

    samples: Float32[np.ndarray, " W"]
    first_sample: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request.

    Attributes:
      status: running; ok; hit_limit: a piece came to its max_length; empty: for all of the text, or for a piece of it, no
        speech token was drawn; non_finite: a stage computed what is no number, and what was heard ends before it; cancelled,
        also where frames were dropped that waited; failed: a stage refused. message: which piece, or what was refused.
      num_text_tokens, num_speech_tokens: without prompts. num_pieces: that the text was split into.
      seconds: of work, by STAGES; of a dispatch that sessions share, each has all of it. first_audio: seconds from
        `open` to the first frame; None before. total: to the end.
    """

    status: str
    message: str
    mode: str
    voice: str
    seed: int
    num_text_tokens: int
    num_speech_tokens: int
    num_pieces: int
    num_samples: int
    rate_hz: int
    seconds: dict[str, float]
    first_audio: float | None
    total: float

    @property
    def audio_seconds(self) -> float:
        """Seconds of sound."""
        return self.num_samples / self.rate_hz

    @property
    def real_time_factor(self) -> float | None:
        """Seconds from `open` to the end a second of sound; None without sound."""
        return self.total / self.audio_seconds if self.num_samples else None
