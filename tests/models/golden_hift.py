"""The official vocoder at its small size (golden/README.md), and still smaller ones of our own."""

import dataclasses
import functools
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.convert.hift import hift_rules
from cv2jax.convert.rules import load_tree
from cv2jax.convert.weight_norm import FoldedReader
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import init_params
from tests.models.golden_flow import NpzReader

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN_CONFIG = HiftVocoderConfig(width=32, f0_width=24)


def abstract_params(config: HiftVocoderConfig):
    return nn.unbox(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))


@functools.cache
def golden_params():
    reader = FoldedReader(NpzReader(GOLDENS / "hift_tiny_weights.npz"))
    return load_tree(hift_rules(GOLDEN_CONFIG), reader, abstract_params(GOLDEN_CONFIG))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """The arrays of `hift_tiny`, the mel as [B F M] and sources as [B W]."""
    arrays = dict(np.load(GOLDENS / "hift_tiny.npz"))
    for name in ("source", "source_cached"):
        arrays[name] = arrays[name][:, 0]
    return arrays | {"mel": arrays["mel"].transpose(0, 2, 1)}


def small_config(**changes) -> HiftVocoderConfig:
    """Two stages of 4 and 3 with a hop of 24 samples at 1,200 Hz; what changes the hop changes the rates with it."""
    sizes = {
        "num_mels": 5,
        "rate_hz": 1200,
        "mel_fft": 96,
        "mel_fmax_hz": 400.0,
        "width": 8,
        "upsample_rates": (4, 3),
        "upsample_kernels": (8, 5),
        "block_kernels": (3, 5),
        "source_kernels": (3, 5),
        "dilations": (1, 2),
        "istft_points": 8,
        "istft_hop": 2,
        "num_harmonics": 2,
        "f0_width": 6,
    } | changes
    sizes["mel_hop"] = math.prod(sizes["upsample_rates"]) * sizes["istft_hop"]
    if "rate_hz" not in changes:
        sizes["rate_hz"] = 50 * sizes["mel_hop"]
    config = HiftVocoderConfig(**sizes)
    config.validate()
    return config


def random_params(config: HiftVocoderConfig, seed: int = 0):
    """Parameters of which every one matters: a voice of a tenth of full scale, F0 on both sides of the voiced threshold."""
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        names, noise = [key.key for key in path], rng.standard_normal(leaf.shape, np.float32)
        if names[-1] == "alpha":
            return jnp.asarray(1 + 0.3 * noise)
        if names[-1] == "kernel":
            return jnp.asarray(noise * np.float32(np.prod(leaf.shape[:-1]) ** -0.5))
        return jnp.asarray(0.1 * noise)

    return jax.tree_util.tree_map_with_path(make, abstract_params(config))


def make_mel(config: HiftVocoderConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, config.num_mels), np.float32)


def with_(config: HiftVocoderConfig, **changes) -> HiftVocoderConfig:
    return dataclasses.replace(config, **changes)
