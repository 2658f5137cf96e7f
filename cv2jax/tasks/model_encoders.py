"""The encoders of a model directory, for enrolment: what must be there, and what makes tokens, mel and embeddings."""

import functools
import os

from cv2jax.config import from_dict
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.speaker_encoder.batching import PIECE_SECONDS
from cv2jax.nn.chunks import NO_CHUNK, stream_mask
from cv2jax.synthesis.encoders import Encoders
from cv2jax.tasks.encoders import embed_recordings, encode_recording, load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_directory import (
    STAND_IN,
    has_stage,
    learnt_encoder,
    require_same_encoder,
    require_same_tokenizer,
    stage_run,
)
from cv2jax.train.run import load_run

LONGEST_SECONDS = float(PIECE_SECONDS[-1])  # of a recording to be embedded


def require_encoders(model: str | os.PathLike[str], *, with_speaker: bool) -> None:
    """Raises UserError, before anything is loaded, for a model directory that lacks an encoder."""
    stage_run(model, "speech_tokenizer")
    if with_speaker:
        stage_run(model, "speaker_encoder")


def load_encoders(model: str | os.PathLike[str], *, with_speaker: bool) -> Encoders:
    """The encoders of a model directory; UserError for one that cannot be read, and where they do not fit the other stages."""
    tokenizer = load_tokenizer(stage_run(model, "speech_tokenizer"))
    require_same_tokenizer(model, tokenizer.hash)
    speaker = load_speaker_encoder(stage_run(model, "speaker_encoder")) if with_speaker else None
    if speaker is not None:
        require_same_encoder(model, speaker.hash)
    has_both = has_stage(model, "flow_matching") and has_stage(model, "speaker_encoder")
    return Encoders(
        encode=functools.partial(encode_recording, tokenizer),
        embed=None if speaker is None else functools.partial(embed_recordings, speaker),
        speech_tokenizer=tokenizer.hash,
        speaker_encoder="" if speaker is None else speaker.hash,
        chunk=streaming_chunk(model),
        stand_ins=has_both and learnt_encoder(stage_run(model, "flow_matching")) == STAND_IN,
    )


def streaming_chunk(model: str | os.PathLike[str]) -> int | None:
    """The chunk that the engine streams a model directory's flow in; None where that is not known."""
    if not has_stage(model, "flow_matching"):
        return None
    facts = load_run(stage_run(model, "flow_matching"))["facts"]
    if "model" not in facts:
        return None
    chunk = stream_mask(from_dict(FlowMatchingConfig, facts["model"]).masks).chunk
    return chunk if chunk < NO_CHUNK else None


def speaker_hash(model: str | os.PathLike[str]) -> tuple[str, str]:
    """(hash of a model directory's speaker encoder, where it lies); ("", "") where it has none.

    Raises UserError where its flow learnt from another's embeddings.
    """
    if not has_stage(model, "speaker_encoder"):
        return "", ""
    run = stage_run(model, "speaker_encoder")
    found = load_speaker_encoder(run).hash
    require_same_encoder(model, found)
    return found, str(run)
