"""The engine of a model directory: its runs loaded and made into stages."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from cv2jax.audio.mel import FLOW_MEL
from cv2jax.config import MeshConfig, UserError
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.generate import choose_mask
from cv2jax.models.speech_tokenizer.tokenize import make_encoder
from cv2jax.models.text_speech_lm.model import init_params
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.bundle_engine import EngineOptions
from cv2jax.synthesis.engine import Engine
from cv2jax.synthesis.sampling import make_request_sampler
from cv2jax.synthesis.stages import MelStage, SpeechStage, Stages, TokenizerStage
from cv2jax.tasks.encoders import load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_directory import STAND_IN, has_stage, learnt_encoder, require_same_encoder, stage_run
from cv2jax.tasks.stages import make_mel_stage, make_speech_stage, make_wave_stage
from cv2jax.tasks.trained import find_text_tokenizer, load_flow, load_params, load_vocoder, text_speech_lm_config
from cv2jax.text.tokenizer import TextTokenizer
from cv2jax.train.run import load_run


def load_model_engine(model: str | os.PathLike[str], options: EngineOptions = EngineOptions()) -> Engine:
    """The engine of a model directory, on this process's first device, in fp32.

    The newest checkpoint of each run speaks, its moving average where it keeps one. The speech tokenizer is read when
    something is converted. Raises UserError for a directory that lacks a stage, for stages that do not fit, and for options
    that cannot be.
    """
    options.validate()
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    speech, tokenizer, read_as = _load_speech(model, mesh, options)
    mel, config = _load_mel(model, mesh)
    vocoder, params = load_vocoder(stage_run(model, "hift_vocoder"), mesh)
    wave = make_wave_stage(vocoder, _on_one_device(params), mel.mel_definition)
    mask = choose_mask(config, chunk=options.chunk, left=options.left)
    return Engine(
        Stages(speech=speech, mel=mel, wave=wave, tokenizer=_tokenizer_stage(model, mel.speech_tokenizer)),
        tokenizer,
        mask=mask,
        plan=options.plan,
        sampling=options.sampling,
        num_slots=options.num_slots,
        max_voices=options.max_voices,
        normalizer=read_as if options.normalizer is None else options.normalizer,
    )


def _load_speech(
    model: str | os.PathLike[str], mesh: Any, options: EngineOptions
) -> tuple[SpeechStage, TextTokenizer, str]:
    """(stage, its text tokenizer, the normaliser of its corpus)."""
    run = stage_run(model, "text_speech_lm")
    described = load_run(run)
    config, facts = text_speech_lm_config(described, run), described["facts"]
    params, _ = load_params(run, functools.partial(init_params, config), mesh, ema=True)
    stage = make_speech_stage(
        config,
        _on_one_device(params),
        make_request_sampler(options.sampling, options.sampling.top_k or config.num_outputs),
        prefix=facts.get("prefix", "none"),
        text_tokenizer=facts["text_tokenizer"],
        speech_tokenizer=facts.get("speech_tokenizer", ""),
    )
    return stage, find_text_tokenizer(described, run), facts.get("normalizer", "")


def _load_mel(model: str | os.PathLike[str], mesh: Any) -> tuple[MelStage, FlowMatchingConfig]:
    run = stage_run(model, "flow_matching")
    learnt = learnt_encoder(run)
    encoder = "" if learnt == STAND_IN else learnt
    if has_stage(model, "speaker_encoder"):
        encoder = load_speaker_encoder(stage_run(model, "speaker_encoder")).hash
        require_same_encoder(model, encoder)
    config, params = load_flow(run, mesh)
    facts = {"speech_tokenizer": load_run(run)["facts"].get("speech_tokenizer", ""), "speaker_encoder": encoder}
    return make_mel_stage(config, _on_one_device(params), mel_definition=FLOW_MEL, **facts), config


def _on_one_device(tree: Any) -> Any:
    """Arrays that a jit without a mesh takes as they are."""
    device = jax.local_devices()[0]
    return jax.tree.map(lambda a: jax.device_put(a, device) if isinstance(a, jax.Array) else a, tree)


def _tokenizer_stage(model: str | os.PathLike[str], expected: str) -> TokenizerStage | None:
    """The speech tokenizer, which is loaded with the first recording; None where the directory has none."""
    if not has_stage(model, "speech_tokenizer"):
        return None
    run = stage_run(model, "speech_tokenizer")

    @functools.cache
    def encoder() -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        loaded = load_tokenizer(run)
        if expected and loaded.hash != expected:
            raise UserError(
                f"{run}: its tokenizer {loaded.hash[:12]} is not that of the flow, {expected[:12]}; put the run there that"
                " made the corpus's tokens"
            )
        return make_encoder(loaded.config, loaded.params, loaded.model_state, batch_seconds=30.0)

    def tokenize(waveform: Float32[np.ndarray, " W"]) -> Int32[np.ndarray, " L"]:
        return encoder()([waveform])[0]

    return TokenizerStage(tokenize=tokenize)
