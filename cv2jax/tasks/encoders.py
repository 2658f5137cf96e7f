"""The encoders of trained runs: the speech tokenizer and the speaker encoder, each with its hash, in fp32 on one device."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float32, Int32

from cv2jax.audio.fbank import FBANK_RATE_HZ
from cv2jax.audio.io import AudioClip, convert_rate
from cv2jax.audio.mel import MEL_RATE_HZ, WHISPER_RATE_HZ, mel_spectrogram
from cv2jax.config import UserError, from_dict
from cv2jax.models.speaker_encoder import model as speaker_model
from cv2jax.models.speaker_encoder.batching import WaveformEmbedder
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import encoder_hash
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import init_model_state
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params, make_encoder, tokenizer_hash
from cv2jax.remote import as_path
from cv2jax.synthesis.encoders import fit_prompt
from cv2jax.tasks.trained import find_step
from cv2jax.train.checkpoint import load_subtree
from cv2jax.train.run import load_run

_ONE_ROW = 1.0  # seconds in a batch, for which every recording is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What a run's newest checkpoint says about tokenizing: Encoder1, the quantizer, and their hash."""

    config: SpeechTokenizerConfig
    params: Any
    model_state: Any
    hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeakerEncoder:
    """A run's encoder at its newest checkpoint, and its hash."""

    config: SpeakerEncoderConfig
    params: Any
    model_state: Any
    step: int
    hash: str


def load_tokenizer(run: str | os.PathLike[str]) -> Tokenizer:
    """Encoder1, quantizer and codebook of the newest checkpoint in the workdir `run`; nothing else is read.

    Raises UserError for a directory that holds no run, no checkpoint or a damaged one, a run of another stage, without a
    quantizer, or with parameters that are not finite.
    """
    run = as_path(run)
    facts, checkpoints = load_run(run).get("facts", {}), run / "checkpoints"
    if "model" not in facts or "quantizer" not in facts["model"]:
        raise UserError(f"{run} is not a run of the speech tokenizer; give the --workdir of one")
    config = from_dict(SpeechTokenizerConfig, facts["model"])
    if config.quantizer == "none":
        raise UserError(f"{run} was trained with model.quantizer=none and gives no tokens; use a run with fsq or vq")
    if not checkpoints.is_dir():
        raise UserError(f"no checkpoint in {checkpoints}; train first, or give the directory of a run")
    config = dataclasses.replace(config, dtype="float32", remat="none")
    shapes = jax.eval_shape(lambda: nn.unbox(init_encoding_params(config, jax.random.key(0))))
    wanted: dict[str, Any] = {"params": shapes}
    state = jax.eval_shape(lambda: nn.unbox(init_model_state(config, jax.random.key(0))))
    if config.quantizer == "vq":
        wanted["model_state"] = {"codebook": state.codebook}
    where = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), wanted)
    loaded = load_subtree(checkpoints, abstract)
    finite = jax.tree.map(lambda a: bool(np.isfinite(a).all()), loaded)
    if not all(jax.tree.leaves(finite)):
        raise UserError(f"the checkpoint in {checkpoints} holds NaN or infinite parameters; use an earlier one")
    if config.quantizer == "vq":
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)  # only training looks at the averages
        state = zeros.replace(codebook=loaded["model_state"]["codebook"])
    params = loaded["params"]
    return Tokenizer(config=config, params=params, model_state=state, hash=tokenizer_hash(config, params, state))


def load_speaker_encoder(run: str | os.PathLike[str]) -> SpeakerEncoder:
    """The speaker encoder of the newest checkpoint in the workdir `run`.

    Raises UserError for a directory that holds no run, no checkpoint or a damaged one, a run of another stage, and for
    parameters that are not finite.
    """
    described, run = load_run(as_path(run)), as_path(run)
    task, facts = described["config"].get("task"), described["facts"]
    if task != "speaker_encoder" or "model" not in facts:
        raise UserError(f"{run}: is a run of {task or 'no known stage'}; give the --workdir of a speaker_encoder")
    config = from_dict(SpeakerEncoderConfig, facts["model"] | {"dtype": "float32"})
    step = find_step(run)
    shapes = jax.eval_shape(
        lambda key: nn.unbox(
            {"params": speaker_model.init_params(config, key), "model_state": speaker_model.init_model_state(config)}
        ),
        jax.random.key(0),
    )
    where = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
    loaded = load_subtree(run / "checkpoints", abstract, step)
    if not all(jax.tree.leaves(jax.tree.map(lambda a: bool(np.isfinite(a).all()), loaded))):
        raise UserError(f"the checkpoint in {run}/checkpoints holds NaN or infinite numbers; use an earlier one")
    params, state = loaded["params"], loaded["model_state"]
    found = encoder_hash(config, params, state)
    return SpeakerEncoder(config=config, params=params, model_state=state, step=step, hash=found)


def encode_recording(
    tokenizer: Tokenizer, clip: AudioClip
) -> tuple[Int32[np.ndarray, " P"], Float32[np.ndarray, "F_prompt M"]]:
    """(speech tokens [P], log-mel [2·P 80]) of a recording, both cut to the shorter one (spec/official.md 2.4)."""
    encoder = make_encoder(tokenizer.config, tokenizer.params, tokenizer.model_state, batch_seconds=_ONE_ROW)
    [tokens] = encoder([convert_rate(clip, WHISPER_RATE_HZ)])
    mel, _ = mel_spectrogram(convert_rate(clip, MEL_RATE_HZ)[None])
    return fit_prompt(tokens, np.asarray(mel[0].T))


def embed_recordings(encoder: SpeakerEncoder, clips: Sequence[AudioClip]) -> Float32[np.ndarray, "N E"]:
    """The raw embedding of each recording, in order; ValueError for one under 55 ms."""
    embedder = WaveformEmbedder(encoder.config, encoder.params, encoder.model_state, batch_seconds=_ONE_ROW)
    vectors = dict(embedder((number, convert_rate(clip, FBANK_RATE_HZ)) for number, clip in enumerate(clips)))
    return np.stack([vectors[number] for number in range(len(clips))])
