"""The batch hash, and what a step logs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.train.step import batch_hash, batch_key


def make(seed=0):
    random = np.random.default_rng(seed)
    return {
        "waveform": random.integers(-(2**15), 2**15, (8, 40)).astype(np.int16),
        "row_mask": random.random(8) > 0.5,
        "rate": random.normal(size=(8, 2)).astype(np.float32),
    }


def value(batch):
    return int(jax.jit(batch_hash)({k: jnp.asarray(v) for k, v in batch.items()}))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_hash_is_the_same_on_every_mesh(mesh):
    made = make_mesh(mesh)
    assert int(jax.jit(batch_hash)(global_batch(made, make(), 8))) == value(make())


def test_the_hash_sees_a_changed_value_a_swapped_row_and_another_name():
    batch = make()
    base = value(batch)
    for name, change in {
        "waveform": lambda x: np.where(np.arange(40) == 7, x + 1, x).astype(np.int16),
        "row_mask": lambda x: ~x,
        "rate": lambda x: x * np.float32(1.0000001),
    }.items():
        assert value(batch | {name: change(batch[name])}) != base, name
    assert value({k: v[::-1] for k, v in batch.items()}) != base
    assert value(batch | {"waveform": np.roll(batch["waveform"], 1, axis=1)}) != base


def test_the_key_names_the_shape():
    assert batch_key(make()) == (("rate", (8, 2)), ("row_mask", (8,)), ("waveform", (8, 40)))
