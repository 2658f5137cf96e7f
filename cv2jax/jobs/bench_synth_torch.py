"""What the official stream costs in PyTorch on this machine, at least: its language model and its velocity network.

`bench synth` is held against it: the machines that it runs on differ by a factor of two, the ratio hardly. Left out, so that
the official code is made faster than it is: the flow's encoder, the vocoder, threads that wait for each other.
"""

import gc
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cv2jax.convert.qwen import save_backbone
from cv2jax.jobs.bench_flow_torch import OfficialEstimator
from cv2jax.jobs.bench_lm_torch import OfficialLm
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.models.text_speech_lm.sequence import SPEECH, TEXT

_FIRST, _LONGEST = 25, 100  # tokens of the official hops, each twice the one before


def solved_lengths(num_prompt: int, num_tokens: int) -> Iterator[int]:
    """Tokens, prompt included, that the official stream solves for each of its packets (spec/official.md 6.1)."""
    hop, done = _FIRST, -num_prompt % _FIRST  # the first hop also fills the prompt's last chunk
    while (done := done + hop) < num_tokens:
        yield num_prompt + done
        hop = min(2 * hop, _LONGEST)
    yield num_prompt + num_tokens


def time_language_model(
    config: TextSpeechLmConfig, place: pathlib.Path, *, num_text: int, num_prompt: int, num_tokens: int
) -> float:
    """Seconds of `num_tokens` drawn tokens behind so many text and speech tokens; their prefill is not counted."""
    params = _random(init_lm, config)
    save_backbone(params, config.backbone, place / "qwen2")
    rest = {name: np.asarray(a) for name, a in params.items() if name not in ("backbone", "text_embedding")}
    lm = OfficialLm(place / "qwen2", rest)
    del params
    kinds = np.repeat(np.array([TEXT, SPEECH], np.int32), [num_text, num_prompt])
    lm.decode(np.zeros_like(kinds), kinds, 2)
    seconds, _ = lm.decode(np.zeros_like(kinds), kinds, num_tokens)
    del lm
    gc.collect()
    return seconds


def time_velocity(config: FlowMatchingConfig, *, num_prompt: int, num_tokens: int) -> float:
    """Seconds of the velocity network for all packets, each of which is solved from the prompt's start on."""
    estimator = OfficialEstimator(config.estimator, jax.device_get(_random(init_flow, config)["estimator"]))
    rng, total = np.random.default_rng(0), 0.0
    speaker, place = rng.standard_normal((2, config.num_mels), np.float32), np.full(2, 0.3, np.float32)
    for length in solved_lengths(num_prompt, num_tokens):
        mels = rng.standard_normal((3, 2, FRAMES_PER_TOKEN * length, config.num_mels), np.float32)
        call = lambda mels=mels: estimator(mels[0], place, mels[1], speaker, mels[2], None)  # noqa: E731
        call()
        start = time.perf_counter()
        for _ in range(config.num_steps):
            call()
        total += time.perf_counter() - start
    return total


def _random(init: Any, config: Any) -> Any:
    return jax.jit(lambda key: nn.unbox(init(config, key)))(jax.random.key(0))
