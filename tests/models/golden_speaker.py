"""CAM++ at its small size with the official weights (golden/README.md), and a smaller one of our own."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.convert.campplus import IGNORED, campplus_rules
from cv2jax.convert.rules import load_tree
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import init_model_state, init_params
from tests.models.golden_reader import WeightsReader

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "campplus_tiny.npz"
GOLDEN_CONFIG = SpeakerEncoderConfig(growth=8, bn_size=2, init_channels=16, embedding_dim=32)
SMALL_CONFIG = SpeakerEncoderConfig(
    num_mels=16,
    head_channels=4,
    init_channels=8,
    growth=4,
    bn_size=2,
    block_layers=(2, 2),
    dilations=(1, 2),
    embedding_dim=6,
    segment_frames=7,
    crop_seconds=0.5,
)
GoldenReader = functools.partial(WeightsReader, GOLDEN)


def abstract_tree(config):
    """Shapes of {"encoder": parameters, "norms": statistics}."""
    shapes = nn.unbox(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))
    return shapes | {"norms": jax.eval_shape(lambda: init_model_state(config)["norms"])}


@functools.cache
def golden_tree():
    """Every tensor of the file; a tree that serves as parameters and as model state."""
    return load_tree(campplus_rules(), GoldenReader(), abstract_tree(GOLDEN_CONFIG), ignored=IGNORED)


def golden_arrays():
    """fbank_T, embedding_T and embedding_kernel_T of each length T."""
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file if not name.startswith("w:")}


def random_tree(config=SMALL_CONFIG, seed=0, **changes):
    """Parameters and statistics of which every one matters; as `golden_tree`."""
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        kind, noise = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if kind in ("scale", "variance"):
            return jnp.asarray(np.exp(0.2 * noise))
        return jnp.asarray(noise * (np.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.3))

    made = jax.tree_util.tree_map_with_path(make, abstract_tree(dataclasses.replace(config, **changes)))
    return made | {"num_batches": jnp.zeros((), jnp.int32)}
