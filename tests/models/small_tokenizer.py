"""A tokenizer and a batch small enough to compile in a second or two."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import SpeechTokenizer, init_model_state, init_params

SMALL = SpeechTokenizerConfig(
    width=16,
    num_heads=2,
    num_layers=1,
    encoder2_layers=1,
    decoder_layers=1,
    num_mels=8,
    fsmn_kernel=5,
    vocabulary_size=12,
    max_text_tokens=7,
    codebook_size=24,
    pitch_weight=0.3,
    dropout=0.0,
    max_freq_bins=4,
    scan_layers=False,
)


def small(**fields) -> SpeechTokenizerConfig:
    config = dataclasses.replace(SMALL, **fields)
    config.validate()
    return config


def make_batch(seed: int = 0, num_rows: int = 4, num_frames: int = 64) -> dict[str, jax.Array]:
    """Random mel of mixed lengths, texts of 5, 3, 0 and 6 characters, the last row only filling."""
    rng = np.random.default_rng(seed)
    lengths = np.resize([num_frames, num_frames - 13, num_frames - 24, num_frames], num_rows)
    batch = {
        "mel": rng.normal(size=(num_rows, SMALL.num_mels, num_frames)).astype(np.float32),
        "num_frames": lengths.astype(np.int32),
        "text_tokens": rng.integers(4, SMALL.vocabulary_size, (num_rows, 6)).astype(np.int32),
        "num_text_tokens": np.resize([5, 3, 0, 6], num_rows).astype(np.int32),
        "row_mask": np.resize([True, True, True, False], num_rows),
        "f0": rng.uniform(0, 300, (num_rows, num_frames // 4)).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def make_variables(config: SpeechTokenizerConfig, seed: int = 0):
    """(params, model_state), unboxed: random numbers in the shapes of `init_params`, so that every parameter matters.

    Drawn by numpy: compiling the real initializers takes longer than any test here.
    """
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(config, key)))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "table"):
            return jnp.asarray(noise / np.sqrt(max(leaf.size // leaf.shape[-1], 8)), jnp.float32)
        return jnp.asarray((path[-1].key == "scale") + 0.1 * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes), nn.unbox(init_model_state(config, key))


def forward(config, params, batch, state, *, deterministic=True, key=None):
    """The training forward of a batch."""
    arguments = [batch[name] for name in ("mel", "num_frames", "text_tokens", "num_text_tokens")]
    rngs = {} if key is None else {"dropout": key}
    options = {"deterministic": deterministic, "row_mask": batch["row_mask"], "rngs": rngs}
    return SpeechTokenizer(config).apply({"params": params}, *arguments, state, **options)
