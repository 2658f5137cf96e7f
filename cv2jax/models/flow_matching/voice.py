"""What is asked of the flow: voices and requests, their checks, and where the solver starts for them."""

import dataclasses

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, Integer, Key, Shaped

from cv2jax.config import UserError
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.noise import OFFICIAL_FRAMES, frame_noise, official_noise
from cv2jax.nn.masks import ChunkMask

FRAMES_PER_SECOND = 50


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
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

    def prompt_mel(self, config: FlowMatchingConfig) -> Float[np.ndarray, "F_prompt M"]:
        """The recording's mel, [0 M] without one."""
        return np.zeros((0, config.num_mels), np.float32) if self.mel is None else np.asarray(self.mel, np.float32)

    def check(self, config: FlowMatchingConfig) -> None:
        """Raises UserError for tokens, mel or embedding that the model cannot take."""
        check_tokens(self.speech_tokens, config, self.name)
        if np.shape(self.speaker_embedding) != (config.speaker_dim,):
            raise UserError(
                f"{self.name}: the speaker embedding has shape {np.shape(self.speaker_embedding)}, the model takes"
                f" ({config.speaker_dim},); use the speaker encoder that it was trained with"
            )
        mel, num_frames = self.prompt_mel(config), FRAMES_PER_TOKEN * len(self.speech_tokens)
        if mel.shape != (num_frames, config.num_mels):
            raise UserError(
                f"{self.name}: the prompt's mel has shape {mel.shape}; its {len(self.speech_tokens)} tokens need"
                f" ({num_frames}, {config.num_mels}): cut both to the shorter one"
            )
        for what, values in (("the speaker embedding", self.speaker_embedding), ("the prompt's mel", mel)):
            if not np.all(np.isfinite(values)):
                raise UserError(f"{self.name}: {what} is not finite at {np.argwhere(~np.isfinite(values))[0].tolist()}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a voice is to say: speech tokens [L], and the key of the noise that their frames start from."""

    voice: Voice
    speech_tokens: Integer[np.ndarray, " L"]
    key: Key[Array, ""] = dataclasses.field(default_factory=lambda: jax.random.key(0))
    name: str = "request"

    def check(self, config: FlowMatchingConfig) -> None:
        """Raises UserError for tokens that the model cannot take, and where there is none."""
        require_tokens(self.speech_tokens, config, self.name)
        self.voice.check(config)


def check_tokens(tokens: Shaped[np.ndarray, "..."], config: FlowMatchingConfig, name: str) -> None:
    """Raises UserError for what are no whole numbers in a row, and one that names the first id outside the codebook."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise UserError(
            f"{name}: speech tokens of shape {tokens.shape} and type {tokens.dtype}; give whole numbers in one row"
        )
    outside = np.flatnonzero((tokens < 0) | (tokens >= config.num_speech_tokens))
    if len(outside):
        raise UserError(
            f"{name}: speech token {tokens[outside[0]]} at place {outside[0]} is outside 0 … {config.num_speech_tokens - 1};"
            " use the tokenizer that the flow was trained with"
        )


def require_tokens(tokens: Shaped[np.ndarray, "..."], config: FlowMatchingConfig, name: str) -> None:
    """`check_tokens`, and UserError where there is no token at all."""
    check_tokens(tokens, config, name)
    if not np.size(tokens):
        raise UserError(f"{name}: has no speech tokens; give it one or more")


def require_finite(mel: Float[np.ndarray, "F M"], first_frame: int, name: str) -> None:
    """Raises UserError that says where a result stops being numbers; frames count from the end of the prompt, or in it."""
    bad = np.flatnonzero(~np.isfinite(mel).all(axis=1))
    if len(bad):
        frame = first_frame + int(bad[0])
        raise UserError(
            f"{name}: the mel is not finite from frame {frame} ({frame / FRAMES_PER_SECOND:.2f} s, speech token"
            f" {frame // FRAMES_PER_TOKEN}) on; check the checkpoint, or compute in float32"
        )


def warn_untrained(config: FlowMatchingConfig, mask: ChunkMask) -> None:
    """One line in the log for a chunk or left context that training never drew, with those that it did."""
    trained = [dataclasses.replace(each, prompt=0).name for each in config.masks]  # any prompt will do
    name = dataclasses.replace(mask, prompt=0).name
    if name not in trained:
        logging.warning("mask %s: the flow was not trained for it, only for %s", name, ", ".join(trained))


def start_noise(
    voices: Key[Array, " B"],
    requests: Key[Array, " B"],
    frames: Int[Array, "B F"],
    num_prompt: Int[Array, " B"],
    num_mels: int,
    *,
    official: bool,
) -> Float[Array, "B F M"]:
    """`frame_noise`, or the rows of the official buffer, which `require_official_noise` has to allow."""
    if not official:
        return _frame_noise(voices, requests, frames, num_prompt, num_mels)
    return jax.device_put(official_noise()[np.asarray(frames)])


def require_official_noise(num_frames: int, config: FlowMatchingConfig, name: str) -> None:
    """Raises UserError for more frames, prompt included, than the official buffer has, and for other mel bins."""
    num_mels = config.num_mels
    if num_mels != official_noise().shape[1]:
        raise UserError(f"{name}: the official noise has {official_noise().shape[1]} mel bins, the model {num_mels}")
    if num_frames > OFFICIAL_FRAMES:
        raise UserError(
            f"{name}: has {num_frames} frames with its prompt, the official noise {OFFICIAL_FRAMES}"
            f" ({OFFICIAL_FRAMES / FRAMES_PER_SECOND:g} s); use drawn noise"
        )


_frame_noise = jax.jit(frame_noise, static_argnums=4)
