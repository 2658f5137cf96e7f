"""Model directories with random weights, as `cv2jax train` would leave their runs, and sounds like speech."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cv2jax.config import to_dict
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import init_model_state
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.state import TrainState
from tests.models.golden_speaker import SMALL_CONFIG, random_tree

TOKENIZER = SpeechTokenizerConfig(
    width=16,
    num_heads=1,
    num_layers=1,
    encoder2_layers=1,
    decoder_layers=1,
    mlp_ratio=2,
    codebook_size=32,
    scan_layers=False,
)
ENCODER = dataclasses.replace(SMALL_CONFIG, num_mels=80, block_layers=(1, 1), dilations=(1, 2))


@functools.cache
def init_tokenizer(config: SpeechTokenizerConfig) -> tuple:
    """(params, model_state) with random numbers."""
    key = jax.random.key(3)
    return jax.jit(lambda: nn.unbox((init_encoding_params(config, key), init_model_state(config, key))))()


def write_run(workdir: pathlib.Path, task: str, facts: dict, variables: tuple | None = None) -> pathlib.Path:
    """A workdir with `run.json`, and a checkpoint of (params, model_state) if there are some."""
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps({"config": {"task": task}, "facts": facts}))
    if variables is not None:
        zero = jax.numpy.zeros((), jax.numpy.int32)
        state = TrainState(step=zero, num_skipped=zero, params=variables[0], opt_state={}, model_state=variables[1])
        with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(7, state)
    return workdir


def make_model_directory(
    root: pathlib.Path, tokenizer: SpeechTokenizerConfig = TOKENIZER, encoder: SpeakerEncoderConfig = ENCODER
) -> pathlib.Path:
    """`root` with a speech tokenizer and a speaker encoder."""
    write_run(root / "speech_tokenizer", "speech_tokenizer", {"model": to_dict(tokenizer)}, init_tokenizer(tokenizer))
    tree = random_tree(encoder)
    variables = {"encoder": tree["encoder"]}, {"norms": tree["norms"], "num_batches": tree["num_batches"]}
    write_run(root / "speaker_encoder", "speaker_encoder", {"model": to_dict(encoder)}, variables)
    return root


def add_flow(
    root: pathlib.Path, speech_tokenizer: str, chunks: tuple[int, ...] = (0, 1, 25, 50), **more: Any
) -> pathlib.Path:
    """`root` with what a flow's run tells of itself, without a checkpoint; `more` facts."""
    nothing = (-1,) * len(chunks)
    config = FlowMatchingConfig(mask_chunks=chunks, mask_lefts=nothing, mask_prompts=(0,) * len(chunks))
    facts = {"model": to_dict(config), "speech_tokenizer": speech_tokenizer, **more}
    write_run(root / "flow_matching", "flow_matching", facts)
    return root


def make_speech(
    seconds: float, rate_hz: int = 16000, *, lead: float = 0.2, trail: float = 0.2, seed: int = 0
) -> np.ndarray:
    """float32 [W] in [-1, 1]: syllables of a moving pitch with hisses between them, silence before and behind."""
    rng = np.random.default_rng(seed)
    num_samples = round(seconds * rate_hz)
    t = np.arange(num_samples) / rate_hz
    spoken = np.clip((t - lead) * (seconds - trail - t) * 1e6, 0, 1)  # 1 between lead and trail
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate_hz
    vowel = sum(0.75**k * np.sin(k * phase) for k in range(1, 24) if 150 * k < rate_hz / 2)
    beat = np.sin(np.pi * 4 * (t - lead))  # two syllables and two hisses a second
    hiss = np.diff(rng.normal(size=num_samples + 1))
    wave = 0.12 * vowel * np.clip(beat, 0, 1) ** 0.5 + 0.02 * hiss * np.clip(-beat, 0, 1)
    return (wave * spoken + 1e-5 * rng.normal(size=num_samples)).astype(np.float32)
