"""What is asked of the flow: who speaks, in arrays, and requests; their checks, and where the solver starts for them."""

import dataclasses
import logging

import jax
import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.nn.chunks import ChunkMask
from cv2jax.shapes import Float, Integer, Key, Shaped
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, MelStage

FRAMES_PER_SECOND = 50


class NonFinite(UserError):
    """A mel or waveform that is not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Who speaks: an embedding, and of a recording its tokens and its mel, which stand in front of every request.

    Attributes:
      speaker_embedding: [E]. speech_tokens: [P], mel: [2·P M], P = 0 without a recording.
      key: of the noise that the recording's frames start from. name: what errors call it.
    """

    speaker_embedding: Float[np.ndarray, " E"]
    speech_tokens: Integer[np.ndarray, " P"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    mel: Float[np.ndarray, "F_prompt M"] | None = None
    key: Key[Array, ""] = dataclasses.field(default_factory=lambda: jax.random.key(0))
    name: str = "voice"

    def prompt_mel(self, stage: MelStage) -> Float[np.ndarray, "F_prompt M"]:
        """The recording's mel, [0 M] without one."""
        return np.zeros((0, stage.num_mels), np.float32) if self.mel is None else np.asarray(self.mel, np.float32)

    def check(self, stage: MelStage) -> None:
        """Raises UserError for tokens, mel or embedding that the model cannot take."""
        check_tokens(self.speech_tokens, stage, self.name)
        if np.shape(self.speaker_embedding) != (stage.speaker_dim,):
            raise UserError(
                f"{self.name}: the speaker embedding has shape {np.shape(self.speaker_embedding)}, the model takes"
                f" ({stage.speaker_dim},); use the speaker encoder that it was trained with"
            )
        mel, num_frames = self.prompt_mel(stage), FRAMES_PER_TOKEN * len(self.speech_tokens)
        if mel.shape != (num_frames, stage.num_mels):
            raise UserError(
                f"{self.name}: the prompt's mel has shape {mel.shape}; its {len(self.speech_tokens)} tokens need"
                f" ({num_frames}, {stage.num_mels}): cut both to the shorter one"
            )
        for what, values in (("the speaker embedding", self.speaker_embedding), ("the prompt's mel", mel)):
            if not np.all(np.isfinite(values)):
                raise UserError(f"{self.name}: {what} is not finite at {np.argwhere(~np.isfinite(values))[0].tolist()}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MelRequest:
    """What a voice is to say: speech tokens [L], and the key of the noise that their frames start from."""

    voice: Prompt
    speech_tokens: Integer[np.ndarray, " L"]
    key: Key[Array, ""] = dataclasses.field(default_factory=lambda: jax.random.key(0))
    name: str = "request"

    def check(self, stage: MelStage) -> None:
        """Raises UserError for tokens that the model cannot take, and where there is none."""
        require_tokens(self.speech_tokens, stage, self.name)
        self.voice.check(stage)


def check_tokens(tokens: Shaped[np.ndarray, "..."], stage: MelStage, name: str) -> None:
    """Raises UserError for what are no whole numbers in a row, and one that names the first id outside the codebook."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise UserError(
            f"{name}: speech tokens of shape {tokens.shape} and type {tokens.dtype}; give whole numbers in one row"
        )
    outside = np.flatnonzero((tokens < 0) | (tokens >= stage.num_speech_tokens))
    if len(outside):
        raise UserError(
            f"{name}: speech token {tokens[outside[0]]} at place {outside[0]} is outside 0 … {stage.num_speech_tokens - 1};"
            " use the tokenizer that the flow was trained with"
        )


def require_tokens(tokens: Shaped[np.ndarray, "..."], stage: MelStage, name: str) -> None:
    """`check_tokens`, and UserError where there is no token at all."""
    check_tokens(tokens, stage, name)
    if not np.size(tokens):
        raise UserError(f"{name}: has no speech tokens; give it one or more")


def require_finite(mel: Float[np.ndarray, "F M"], first_frame: int, name: str) -> None:
    """Raises NonFinite that says where a result stops being numbers; frames count from the end of the prompt, or in it."""
    bad = np.flatnonzero(~np.isfinite(mel).all(axis=1))
    if len(bad):
        frame = first_frame + int(bad[0])
        raise NonFinite(
            f"{name}: the mel is not finite from frame {frame} ({frame / FRAMES_PER_SECOND:.2f} s, speech token"
            f" {frame // FRAMES_PER_TOKEN}) on; check the checkpoint, or compute in float32"
        )


def warn_untrained(stage: MelStage, mask: ChunkMask) -> None:
    """One line in the log for a chunk or left context that training never drew, with those that it did."""
    trained = [dataclasses.replace(each, prompt=0).name for each in stage.trained]  # any prompt will do
    name = dataclasses.replace(mask, prompt=0).name
    if name not in trained:
        logging.warning("mask %s: the flow was not trained for it, only for %s", name, ", ".join(trained))


def require_frames(num_frames: int, stage: MelStage, name: str) -> None:
    """Raises UserError for more frames, prompt included, than the stage's noise reaches."""
    if stage.max_frames is not None and num_frames > stage.max_frames:
        raise UserError(
            f"{name}: has {num_frames} frames with its prompt, the official noise {stage.max_frames}"
            f" ({stage.max_frames / FRAMES_PER_SECOND:g} s); use drawn noise"
        )


def key_data(*keys: Key[Array, ""]) -> Shaped[np.ndarray, "B ..."]:
    """The raw data of keys, a row each, as stages take them."""
    return np.stack([np.asarray(jax.random.key_data(key)) for key in keys])
