"""The official flow at its small size: configuration, parameters in our tree, and a small one of our own (golden/README.md)."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.convert.flow import flow_rules
from cv2jax.convert.rules import load_tree
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CHUNK = 5  # tokens; the golden's static_chunk_size
GOLDEN_CONFIG = FlowMatchingConfig(
    num_speech_tokens=61,
    speaker_dim=24,
    encoder=FlowEncoderConfig(width=32, num_heads=4, mlp_dim=48, num_layers=2, num_upsampled_layers=2),
    estimator=EstimatorConfig(width=16, num_blocks=2, num_mid_stages=2, num_heads=2, head_dim=8),
    loss="mse",
)


class NpzReader:
    """Tensors of an npz for the rule engine."""

    def __init__(self, path: pathlib.Path) -> None:
        self.place = str(path)
        self._arrays = dict(np.load(path))

    def names(self):
        return {name: (array.shape, array.dtype) for name, array in self._arrays.items()}

    def read(self, name, index):
        return self._arrays[name][index]


def golden_params(config: FlowMatchingConfig = GOLDEN_CONFIG):
    """Every tensor of the file, in the tree of `config` (scanned or not)."""
    abstract = nn.unbox(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))
    return load_tree(flow_rules(), NpzReader(GOLDENS / "flow_tiny_weights.npz"), abstract)


def load(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(array) for key, array in np.load(GOLDENS / f"{name}.npz").items()}


def small_config(**changes) -> FlowMatchingConfig:
    """Another small model, of sizes that share nothing with the golden's."""
    config = FlowMatchingConfig(
        num_speech_tokens=40,
        num_mels=8,
        speaker_dim=6,
        encoder=FlowEncoderConfig(width=16, num_heads=2, mlp_dim=24, num_layers=1, num_upsampled_layers=2),
        estimator=EstimatorConfig(width=12, num_blocks=1, num_mid_stages=2, num_heads=3, head_dim=4, mlp_ratio=2),
        num_steps=3,
        temperature=0.7,
    )
    return dataclasses.replace(config, **changes)


def random_params(config: FlowMatchingConfig, seed: int = 0):
    """Parameters of which every one matters: biases and norms are random too. By numpy, which has nothing to compile."""
    shapes = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        kind, noise = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if kind == "scale":
            return jnp.asarray(1 + 0.1 * noise)
        return jnp.asarray(noise * (max(leaf.shape[-3:-1]) ** -0.5 if kind == "kernel" else 0.2))

    return jax.tree_util.tree_map_with_path(make, shapes)
