"""The parts of a bundle at their smallest: the stages of `small_engine`, a speech tokenizer, a speaker encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS
from cv2jax.nn.chunks import ChunkMask
from cv2jax.synthesis.bundle import MEL, SPEAKER, SPEECH, TOKENS, WAVE
from cv2jax.tasks.bundle_parts import Part, Parts
from cv2jax.tasks.bundle_programs import Sizes
from tests import small_model_directory as small
from tests.models import golden_flow, golden_hift
from tests.models.golden_lm import golden_config, golden_params
from tests.models.golden_speaker import random_tree
from tests.synthesis import small_engine

SIZES = Sizes(
    slot_counts=(1, 2),
    cache_lengths=(128, 256),
    prefill_sizes=(8, 32),
    hop_sizes=(10,),
    rooms=(50, 100),
    wave_sizes=(8, 32),
    num_steps=9,
    recordings=(3,),
)


@functools.cache
def lm_params():
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda a: jnp.asarray(a + 0.15 * rng.normal(size=a.shape), jnp.float32), golden_params(golden_config())
    )


@functools.cache
def vocoder_params():
    params = golden_hift.random_params(small_engine.VOCODER)
    params["f0_predictor"]["out"]["bias"] = jnp.full(1, 3.0)  # all voiced, as in `small_engine`
    return params


def make_parts(*, encoders: bool = False) -> Parts:
    facts = {"mel_definition": small_engine.MEL, "speech_tokenizer": "tok", "speaker_encoder": "spk"}
    hashes = {"text_tokenizer": small_engine.tokenizer().hash, "speech_tokenizer": "tok", "prefix": "none"}
    stages = {
        SPEECH: Part(config=golden_config(), load=lm_params, facts=hashes),
        MEL: Part(
            config=small_engine.FLOW,
            load=functools.partial(golden_flow.random_params, small_engine.FLOW),
            facts=facts,
        ),
        WAVE: Part(config=small_engine.VOCODER, load=vocoder_params, facts={"mel_definition": small_engine.MEL}),
    }
    if encoders:
        params, _ = small.init_tokenizer(small.TOKENIZER)
        tree = random_tree(small.ENCODER)
        stages[TOKENS] = Part(
            config=small.TOKENIZER,
            load=lambda: {"params": {part: params[part] for part in ENCODING_PARTS if part in params}},
            facts={"hash": "tok"},
        )
        stages[SPEAKER] = Part(
            config=small.ENCODER,
            load=lambda: {"encoder": tree["encoder"], "norms": tree["norms"]},
            facts={"hash": "spk"},
        )
    return Parts(
        stages=stages,
        text_tokenizer=small_engine.tokenizer(),
        normalizer="none",
        mask=ChunkMask(chunk=small_engine.CHUNK),
        voices={},
    )
