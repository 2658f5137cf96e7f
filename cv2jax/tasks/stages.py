"""The stages that the engine drives, made of models and their parameters (`cv2jax.synthesis.stages` says what they are)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.config import UserError
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.noise import OFFICIAL_FRAMES, official_noise
from cv2jax.models.flow_matching.step import Hop, grow_state
from cv2jax.models.flow_matching.step import init_state as init_flow_state
from cv2jax.models.flow_matching.stream import draw_noise, recycle, solve_program, step_program
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import hold_back
from cv2jax.models.hift_vocoder.stream import init_state as init_vocoder_state
from cv2jax.models.hift_vocoder.stream import require_mel
from cv2jax.models.hift_vocoder.stream import step as vocoder_step
from cv2jax.models.hift_vocoder.stream import whole as vocoder_whole
from cv2jax.models.text_speech_lm import decode
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.signal import ENDLESS
from cv2jax.parallel.sharding import num_batch_shards
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.stages import Arrays, Controls, Drawn, MelBatch, MelHop, MelStage, SpeechStage, State, WaveStage

MAX_POSITIONS = 32_768  # that the backbone was trained for (max_position_embeddings)


def make_speech_stage(
    config: TextSpeechLmConfig,
    params: PyTree,
    sampler: RequestSampler,
    *,
    num_steps: int = 32,
    impl: str = "xla",
    max_positions: int = MAX_POSITIONS,
    **facts: Any,
) -> SpeechStage:
    """The language model; params are those of training, scanned or not.

    A mesh, where the caller has set one, shards the slots: it must be set when the stage is made and when it is used.

    Args:
      num_steps: draws of a dispatch at most. impl: of attention. max_positions: of a request. facts: prefix and hashes.
    """
    params, mesh = decode.decoder_params(config, params), jax.sharding.get_mesh()

    def run_decode(state: State, controls: Controls) -> tuple[State, Drawn]:
        fields = controls._asdict() | {"key": jax.random.wrap_key_data(controls.key)}
        state, drawn = decode.decode(
            config, sampler, params, state, decode.Controls(**fields), num_steps=num_steps, impl=impl
        )
        return state, Drawn(drawn.speech_tokens, drawn.num_speech_tokens, drawn.status)

    lengths = [decode.SMALLEST_CACHE]
    while lengths[-1] < max_positions:
        lengths.append(2 * lengths[-1])
    return SpeechStage(
        init_state=lambda num_slots, length: decode.init_state(config, num_slots, length, sampler.win_size),
        prefill=lambda state, *fed: decode.prefill(config, params, state, *fed, impl=impl),
        decode=run_decode,
        reset=decode.reset,
        grow=lambda state, length: decode.grow(state, length),
        sampler=sampler,
        text_vocabulary_size=config.backbone.vocabulary_size,
        num_speech_tokens=config.num_speech_tokens,
        cache_lengths=tuple(lengths),
        max_positions=max_positions,
        num_steps=num_steps,
        slot_multiple=1 if mesh.empty else num_batch_shards(mesh),
        ratio=config.ratio,
        **facts,
    )


def make_mel_stage(
    config: FlowMatchingConfig, params: PyTree, *, use_official_noise: bool = False, **facts: Any
) -> MelStage:
    """The flow.

    Args:
      use_official_noise: start from the fixed buffer of the official code instead of noise drawn from the keys; UserError
        where that has other mel bins. facts: hashes and the mel's definition.
    """
    num_mels = config.num_mels
    if use_official_noise and num_mels != official_noise().shape[1]:
        raise UserError(f"the official noise has {official_noise().shape[1]} mel bins, the model {num_mels}")

    def noise(voices: Arrays, requests: Arrays, frames: Arrays, num_prompt: Arrays) -> Arrays:
        if use_official_noise:
            return jax.device_put(official_noise()[np.asarray(frames)])
        keys = jax.random.wrap_key_data(jnp.asarray(voices)), jax.random.wrap_key_data(jnp.asarray(requests))
        return draw_noise(*keys, jnp.asarray(frames), jnp.asarray(num_prompt), num_mels)

    def solve(batch: MelBatch) -> Arrays:
        fields = batch._asdict()
        noise = fields.pop("noise")
        mask = MaskSpec(kind="chunk", **{name: fields.pop(name) for name in ("chunk", "left", "prompt")})
        return solve_program(config)(params, fields, noise, mask)

    def step(state: State, hop: MelHop) -> tuple[Arrays, State]:
        return step_program(config)(params, state, Hop(**hop._asdict()))

    return MelStage(
        init_state=functools.partial(init_flow_state, config, 1),
        step=step,
        grow=grow_state,
        refill=recycle,
        noise=noise,
        solve=solve,
        num_speech_tokens=config.num_speech_tokens,
        num_mels=num_mels,
        speaker_dim=config.speaker_dim,
        trained=config.masks,
        max_frames=OFFICIAL_FRAMES if use_official_noise else None,
        **facts,
    )


def make_wave_stage(config: HiftVocoderConfig, params: PyTree, definition: MelDefinition = FLOW_MEL) -> WaveStage:
    """The vocoder; UserError where it was made for mel of another definition."""
    require_mel(config, definition)
    wrap = lambda key: jax.random.wrap_key_data(jnp.asarray(key))  # noqa: E731

    def step(state: State, mel: Arrays, key: Arrays, num_valid: Arrays, total: Arrays) -> tuple[Arrays, State]:
        made, state = vocoder_step(config, params, state, mel, wrap(key), num_valid, total)
        return made.waveform, state

    def whole(mel: Arrays, key: Arrays, num_frames: Arrays) -> Arrays:
        return vocoder_whole(config, params, mel, wrap(key), num_frames).waveform

    return WaveStage(
        init_state=functools.partial(init_vocoder_state, config, 1),
        step=step,
        whole=whole,
        hold_back=hold_back(config),
        endless=ENDLESS,
        mel_definition=definition,
    )
