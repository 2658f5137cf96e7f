"""What makes a voice of recordings: a speech tokenizer, a speaker encoder and the mel's front end, of a model or a bundle."""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np

from cv2jax.audio.io import AudioClip, convert_rate
from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK
from cv2jax.shapes import Float32, Int32
from cv2jax.synthesis.bundle import load_bundle
from cv2jax.synthesis.bundle_files import EXPORT_AGAIN
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN

Prompt = tuple[Int32[np.ndarray, " P"], Float32[np.ndarray, "F_prompt M"]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoders:
    """The encoders of one model.

    Attributes:
      encode: a recording → (speech tokens [P], log-mel [2·P M]). embed: recordings → raw embeddings [N E]; None where there is
        no speaker encoder. speech_tokenizer, speaker_encoder: their hashes. chunk: that the flow streams in; None: not known.
      stand_ins: whether it learnt from stand-ins for embeddings, made of names.
    """

    encode: Callable[[AudioClip], Prompt]
    embed: Callable[[Sequence[AudioClip]], Float32[np.ndarray, "N E"]] | None
    speech_tokenizer: str
    speaker_encoder: str
    chunk: int | None = None
    stand_ins: bool = False


def fit_prompt(tokens: Int32[np.ndarray, " L"], mel: Float32[np.ndarray, "F M"]) -> Prompt:
    """(tokens, mel) of one recording, both cut to the shorter one (spec/official.md 2.4)."""
    count = min(len(mel) // FRAMES_PER_TOKEN, len(tokens))
    return tokens[:count], np.ascontiguousarray(mel[: FRAMES_PER_TOKEN * count], np.float32)


def load_bundle_encoders(path: str | os.PathLike[str]) -> Encoders:
    """The encoders of a bundle, on this process's first device; their programs are read when something is encoded.

    Raises UserError as `load_bundle`, and for a bundle that was made of a model without a speech tokenizer.
    """
    bundle = load_bundle(path)
    tokenizer, speaker, prompt_mel = bundle.stages.tokenizer, bundle.stages.speaker, bundle.prompt_mel
    if tokenizer is None or prompt_mel is None:
        raise UserError(
            f"{path}: the bundle has no speech tokenizer; enroll with the model directory, or put one there and export it"
            f" again ({EXPORT_AGAIN} cannot add it)"
        )

    mask = bundle.facts.mask

    def encode(clip: AudioClip) -> Prompt:
        tokens = tokenizer.tokenize(convert_rate(clip, tokenizer.rate_hz))
        return fit_prompt(tokens, prompt_mel.make(convert_rate(clip, prompt_mel.rate_hz)))

    def embed(clips: Sequence[AudioClip]) -> Float32[np.ndarray, "N E"]:
        assert speaker is not None
        return np.stack([speaker.embed(convert_rate(clip, speaker.rate_hz)) for clip in clips])

    return Encoders(
        encode=encode,
        embed=None if speaker is None else embed,
        speech_tokenizer=tokenizer.hash,
        speaker_encoder="" if speaker is None else speaker.hash,
        chunk=mask.chunk if mask.chunk < NO_CHUNK else None,
        stand_ins=speaker is not None and bundle.facts.manifest["stand_ins"],
    )
