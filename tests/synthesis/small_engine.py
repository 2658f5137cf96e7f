"""All stages at their smallest, with random parameters: 61 speech tokens, 5 mel bins, 24 samples a frame at 1,200 Hz."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.audio.mel import MelDefinition
from cv2jax.nn.chunks import ChunkMask
from cv2jax.synthesis.engine import Engine
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.stages import Stages, TokenizerStage
from cv2jax.synthesis.voice import Voice
from cv2jax.tasks.stages import make_mel_stage, make_speech_stage, make_wave_stage
from cv2jax.text.tokenizer import train_text_tokenizer
from tests.models import golden_flow, golden_hift
from tests.models.golden_lm import golden_config, golden_params

VOCODER = golden_hift.small_config()
MEL = MelDefinition(**{field.name: getattr(VOCODER, field.name) for field in dataclasses.fields(MelDefinition)})
FLOW = golden_flow.small_config(num_speech_tokens=61, num_mels=5, mask_chunks=(5,), mask_lefts=(-1,), mask_prompts=(0,))
CHUNK, PER_TOKEN = 5, 2 * VOCODER.mel_hop  # tokens; samples of a token
TEXT = "one two three four five"


@functools.cache
def tokenizer():
    return train_text_tokenizer([TEXT] * 3, 300)


@functools.cache
def speech_stage(num_steps: int = 9, spoilt: int | None = None):
    """The language model; the embedding of text token `spoilt` is NaN."""
    rng = np.random.default_rng(7)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.15 * rng.normal(size=a.shape), jnp.float32), golden_params(golden_config())
    )
    if spoilt is not None:
        params["text_embedding"] = params["text_embedding"].at[spoilt].set(jnp.nan)
    return make_speech_stage(golden_config(), params, RequestSampler(), num_steps=num_steps)


@functools.cache
def stages() -> Stages:
    facts = {"mel_definition": MEL, "speech_tokenizer": "tok", "speaker_encoder": "spk"}
    vocoder = golden_hift.random_params(VOCODER)
    vocoder["f0_predictor"]["out"]["bias"] = jnp.full(1, 3.0)  # all voiced: noise would hide what F0 does
    return Stages(
        speech=speech_stage(),
        mel=make_mel_stage(FLOW, golden_flow.random_params(FLOW), **facts),
        wave=dataclasses.replace(make_wave_stage(VOCODER, vocoder, MEL), sizes=(8, 32)),
        tokenizer=TokenizerStage(tokenize=lambda wave: np.arange(len(wave) // 640, dtype=np.int32) % 61, hash="tok"),
    )


@functools.cache
def voice(num_tokens: int = 12) -> Voice:
    rng = np.random.default_rng(num_tokens)
    return Voice(
        speaker_embedding=rng.normal(size=FLOW.speaker_dim).astype(np.float32),
        speech_tokens=rng.integers(0, 61, num_tokens).astype(np.int32),
        mel=rng.normal(size=(2 * num_tokens, 5)).astype(np.float32),
        text="two one" if num_tokens else "",
        name="ann",
        speech_tokenizer="tok",
        speaker_encoder="spk",
        mel_definition=MEL,
    )


def make_engine(**settings) -> Engine:
    settings = {
        "mask": ChunkMask(chunk=CHUNK),
        "hop_sizes": (10,),
        "num_slots": 2,
        "normalizer": "none",
        "plan": HopPlan(real_time_factor=0.5),
    } | settings
    return Engine(settings.pop("stages", stages()), settings.pop("tokenizer", tokenizer()), **settings)


def ask(**settings) -> Request:
    """A request of 31 to 40 tokens, where it draws any."""
    drawn = {} if settings.get("mode") == "conversion" else {"max_length": 40, "min_length": 31}
    return Request(**({"voice": voice(), "text": TEXT} | drawn | settings))


def hear(session) -> np.ndarray:
    """The waveform; counters must be those of its samples."""
    frames, place = list(session), 0
    for frame in frames:
        assert frame.first_sample == place
        assert np.abs(frame.samples).max() <= 0.99
        place += len(frame.samples)
    return np.concatenate([frame.samples for frame in frames]) if frames else np.zeros(0, np.float32)
