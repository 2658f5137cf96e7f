"""Mel of whole pieces, where everything sees everything: upstream's offline synthesis, behind the face of `MelStreams`."""

import dataclasses

import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.shapes import Float, Integer, Key
from cv2jax.synthesis.mel_solver import MelSolver
from cv2jax.synthesis.prompt import MelRequest, Prompt
from cv2jax.synthesis.stages import MelStage


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WholeVoice:
    """A voice of whole pieces: of its recording nothing can be solved before what follows is known."""

    voice: Prompt


class WholeMels:
    """The flow of one checkpoint under the mask without chunks."""

    mask = ChunkMask(chunk=NO_CHUNK)

    def __init__(self, stage: MelStage) -> None:
        """Compiles nothing yet. UserError for a stage that only streams."""
        if stage.solve is None:
            raise UserError("this model only streams, it has no program for whole pieces; leave offline out")
        self.stage, self._solver = stage, MelSolver(stage, self.mask, max_rows=1)

    def enroll(self, voice: Prompt) -> WholeVoice:
        """The voice, checked; UserError where `Prompt.check` finds something."""
        voice.check(self.stage)
        return WholeVoice(voice=voice)

    def start(self, voice: WholeVoice, key: Key[Array, ""], name: str = "request") -> "WholeMel":
        """A piece behind the voice's recording, whose noise draws from `key`."""
        return WholeMel(self._solver, voice.voice, key, name)


class WholeMel:
    """One piece, which is one hop."""

    def __init__(self, solver: MelSolver, voice: Prompt, key: Key[Array, ""], name: str) -> None:
        self._solver, self._voice, self._key, self._name = solver, voice, key, name

    def num_to_border(self) -> int:
        """NO_CHUNK: no hop but the last."""
        return NO_CHUNK

    def hop(
        self, speech_tokens: Integer[np.ndarray, " L"], lookahead: Integer[np.ndarray, " ahead"] | None = None
    ) -> Float[np.ndarray, "F M"]:
        """The log-mel, F = 2·L, of all tokens. UserError for what `MelSolver` refuses, ValueError for tokens that follow."""
        if lookahead is not None:
            raise ValueError("a whole piece is one hop, behind which nothing follows")
        tokens = np.asarray(speech_tokens, np.int32)
        return self._solver([MelRequest(voice=self._voice, speech_tokens=tokens, key=self._key, name=self._name)])[0]
