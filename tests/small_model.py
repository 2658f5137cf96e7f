"""A model directory of small runs with random parameters, as `cv2jax train` leaves them, and a voice for it."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.audio.mel import FLOW_MEL
from cv2jax.config import load_config, override
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.hift_vocoder.model import init_params as init_vocoder
from cv2jax.synthesis.voice import Voice, save_voice
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.gan_step import init_gan_state
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.run import save_or_compare
from cv2jax.train.state import init_train_state
from tests.small_flow_run import SMALL_FLOW
from tests.small_lm_run import make_run
from tests.small_token_corpus import NUM_CODES, make_small_token_corpus
from tests.small_vocoder_run import SMALL_VOCODER

TOKENIZER = "abc"


def make_small_model(root: pathlib.Path, speech_tokenizer: str = TOKENIZER) -> pathlib.Path:
    """`root` with all that a text needs, and the voice `ann`, whose recording has 30 tokens."""
    corpus = make_small_token_corpus(root.with_name(f"{root.name}-corpus"), speech_tokenizer=speech_tokenizer)
    make_run(root / "text_speech_lm", corpus)
    flow = override(load_config("flow_matching_tiny"), [*SMALL_FLOW, "optimizer.ema_decay=0.0"])
    optimizer = make_optimizer(flow.optimizer, flow.num_steps)
    shapes = jax.eval_shape(lambda key: init_train_state(init_flow(flow.model, key), {}, optimizer), jax.random.key(0))
    model = dataclasses.asdict(dataclasses.replace(flow.model, dtype="float32"))
    facts = {"speech_tokenizer": speech_tokenizer}
    facts["model"] = {k: v for k, v in model.items() if k not in ("remat", "scan_layers", "attention")}
    _save(root / "flow_matching", flow, shapes, facts, 0.1)
    vocoder = override(load_config("hift_vocoder_tiny"), [*SMALL_VOCODER, "optimizer.ema_decay=0.0"])
    generator = dataclasses.replace(vocoder.model.generator, dtype="float32")
    optimizer = make_optimizer(vocoder.optimizer, vocoder.num_steps)
    init = lambda key: init_gan_state(init_vocoder(generator, key), {}, optimizer, optimizer)  # noqa: E731
    facts = {"model": dataclasses.asdict(generator), "mel": dataclasses.asdict(FLOW_MEL)}
    _save(root / "hift_vocoder", vocoder, jax.eval_shape(init, jax.random.key(0)), facts, 0.05)
    save_voice(root / "voices" / "ann.safetensors", make_small_voice(speech_tokenizer=speech_tokenizer))
    return root


def make_small_voice(num_tokens: int = 30, speech_tokenizer: str = TOKENIZER) -> Voice:
    rng = np.random.default_rng(num_tokens)
    return Voice(
        speaker_embedding=rng.normal(size=8).astype(np.float32),
        speech_tokens=rng.integers(0, NUM_CODES, num_tokens).astype(np.int32),
        mel=rng.normal(size=(2 * num_tokens, 80)).astype(np.float32),
        text="one two" if num_tokens else "",
        name="ann",
        speech_tokenizer=speech_tokenizer,
    )


def _save(workdir, config, shapes, facts, scale):
    rng = np.random.default_rng(0)
    draw = lambda a: jnp.asarray((scale * rng.normal(size=a.shape)).astype(a.dtype))  # noqa: E731
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, jax.tree.map(draw, nn.unbox(shapes)))
    save_or_compare(workdir, config, facts, started=False, write=True)
