"""The official multi-resolution discriminator (`goldens/mrd_weights.npz`) in our tree, and a small pair of our own."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.convert.discriminators import spectral_rules
from cv2jax.convert.rules import load_tree
from cv2jax.convert.weight_norm import FoldedReader
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig
from cv2jax.models.hift_vocoder.discriminators import Discriminators
from tests.models.golden_flow import NpzReader

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SPECTRAL = DiscriminatorConfig(periods=())
SMALL = DiscriminatorConfig(
    periods=(2, 5),
    period_channels=(4, 6, 8),
    fft_sizes=(64, 32),
    hop_lengths=(16, 6),
    window_lengths=(40, 32),
    spectral_channels=4,
)


def abstract_params(config: DiscriminatorConfig, width: int = 2400):
    init = Discriminators(config).init
    return nn.unbox(jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), jnp.float32)))["params"]


def spectral_params():
    reader = FoldedReader(NpzReader(GOLDENS / "mrd_weights.npz"))
    return load_tree(spectral_rules(""), reader, abstract_params(SPECTRAL))


def random_params(config: DiscriminatorConfig, seed: int = 0):
    """Parameters of which every one matters, of a scale at which leaky ReLUs see both signs."""
    rng = np.random.default_rng(seed)

    def make(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.float32(fan_in) ** 0.5)

    return jax.tree.map(make, abstract_params(config))
