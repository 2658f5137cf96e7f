"""CAM++ against the official numbers; batches of unequal lengths, training and its state, the hash."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, load_config
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import (
    MIN_FRAMES,
    MIN_SAMPLES,
    embed,
    embed_in_training,
    encoder_hash,
    inference_config,
    init_model_state,
    init_params,
)
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import axis_rules, batch_sharding, replicated
from tests.models.golden_speaker import GOLDEN_CONFIG, SMALL_CONFIG, golden_arrays, golden_tree, random_tree

OFFICIAL_PARAMETERS = 6_848_544  # spec/frontends.md 2.2
OFFICIAL_NUMBERS = 6_930_842 - 122  # of its state dict with the statistics, less torch's 122 counts of batches
NUM_FRAMES = np.array([33, 4, 20, 7])
run = jax.jit(embed, static_argnums=0)
run_in_training = jax.jit(embed_in_training, static_argnums=0)


def batch(seed=0, num_mels=16):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(NUM_FRAMES), NUM_FRAMES.max(), num_mels)).astype(np.float32)
    valid = np.arange(NUM_FRAMES.max()) < NUM_FRAMES[:, None]
    return np.where(valid[..., None], features, 0), valid


def assert_close(got, want, tolerance):
    """Leaf by leaf, of its largest number: gradients of what is summed over hundreds of frames are large."""
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize(
    ("partial", "name"), [pytest.param("count", "embedding", marks=pytest.mark.full), ("kernel", "embedding_kernel")]
)
def test_embeddings_are_the_official_ones_all_lengths_in_one_batch_behind_garbage(partial, name):
    config, tree, golden = dataclasses.replace(GOLDEN_CONFIG, partial_segment=partial), golden_tree(), golden_arrays()
    sizes = [50, 200, 345]
    features = np.full((3, 345, 80), np.nan, np.float32)
    for row, size in enumerate(sizes):
        features[row, :size] = golden[f"fbank_{size}"][0]
    want = np.concatenate([golden[f"{name}_{size}"] for size in sizes])
    got = run(config, tree, tree, features, np.array(sizes))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_two_rules_differ_in_a_segment_that_is_not_whole():
    golden = golden_arrays()
    gaps = [float(np.abs(golden[f"embedding_{t}"] - golden[f"embedding_kernel_{t}"]).max()) for t in (50, 200, 345)]
    assert gaps[0] > 1e-3
    assert gaps[1] == 0  # 100 frames at 50 Hz: one whole segment
    assert gaps[2] > 1e-4


def test_the_official_model_has_the_released_size():
    config = load_config("speaker_encoder_official").model
    shapes = jax.eval_shape(
        lambda key: (init_params(config, key), init_model_state(config)["norms"]), jax.random.key(0)
    )
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes[0]["encoder"]) == OFFICIAL_PARAMETERS
    assert count(shapes) == OFFICIAL_NUMBERS
    assert config.embedding_dim == 192


@pytest.mark.parametrize("partial", ["count", pytest.param("kernel", marks=pytest.mark.full)])
def test_a_row_in_a_batch_is_as_alone_whatever_lies_behind_it(partial):
    config, tree = dataclasses.replace(SMALL_CONFIG, partial_segment=partial), random_tree()
    features, valid = batch()
    together = run(config, tree, tree, features, NUM_FRAMES)
    garbage = np.where(valid[..., None], features, np.nan)
    np.testing.assert_array_equal(run(config, tree, tree, garbage, NUM_FRAMES), together)
    for row, count in enumerate(NUM_FRAMES):
        alone = run(config, tree, tree, features[row : row + 1, :count], NUM_FRAMES[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_the_shortest_row_has_an_embedding_and_none_of_less_is_taken():
    tree = random_tree()
    features = np.random.default_rng(0).normal(size=(1, MIN_FRAMES, 16)).astype(np.float32)
    assert np.isfinite(run(SMALL_CONFIG, tree, tree, features, np.array([MIN_FRAMES]))).all()
    assert MIN_SAMPLES == 880


def training_numbers(features, num_frames, config=SMALL_CONFIG):
    """Embedding, new state and gradient of a sum of squares over the rows that count."""
    tree = random_tree(config)

    def loss(params):
        embedding, state = embed_in_training(config, params, tree, jnp.asarray(features), jnp.asarray(num_frames))
        kept = jnp.where((num_frames > 0)[:, None], embedding, 0)
        return jnp.sum(jnp.sin(kept)), (embedding, state)

    (_, (embedding, state)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))({"encoder": tree["encoder"]})
    return embedding, state, gradient


@pytest.mark.slow
def test_in_training_padding_and_rows_that_only_fill_change_nothing():
    features, valid = batch()
    embedding, state, gradient = training_numbers(features, NUM_FRAMES)
    garbage = np.where(valid[..., None], features, np.nan)
    more = np.concatenate([garbage, np.full((2, *features.shape[1:]), np.nan, np.float32)])
    wide = np.pad(more, ((0, 0), (0, 6), (0, 0)), constant_values=np.nan)
    filled, filled_state, filled_gradient = training_numbers(wide, np.concatenate([NUM_FRAMES, [0, 0]]))
    np.testing.assert_allclose(filled[:4], embedding, atol=5e-5)  # a norm over four rows magnifies what sums round
    assert_close(filled_state, state, 1e-5)
    assert_close(filled_gradient, gradient, 1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((filled_state, filled_gradient)))


def test_training_moves_every_statistic_and_counts_batches():
    features, _ = batch()
    _, state, gradient = training_numbers(features, NUM_FRAMES)
    old = random_tree()["norms"]
    assert int(state["num_batches"]) == 1
    assert jax.tree.structure(state["norms"]) == jax.tree.structure(old)
    assert all(
        np.abs(new - was).max() > 0 for new, was in zip(*map(jax.tree.leaves, (state["norms"], old)), strict=True)
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_statistics_that_settled_give_in_use_what_training_gave():
    """The same batch again and again: its running statistics become its own, up to the unbiased variance."""
    features, tree = np.random.default_rng(1).normal(size=(16, 40, 16)).astype(np.float32), random_tree()
    num_frames, state = np.full(16, 40), tree
    for _ in range(150):
        embedding, state = run_in_training(SMALL_CONFIG, tree, state, features, num_frames)
    used = run(SMALL_CONFIG, tree, state, features, num_frames)
    np.testing.assert_allclose(used, embedding, atol=0.2)  # the variance of 16 embeddings differs by 16/15, and so on
    cosine = jnp.sum(used * embedding, 1) / jnp.linalg.norm(used, axis=1) / jnp.linalg.norm(embedding, axis=1)
    assert float(cosine.min()) > 0.99


@pytest.mark.full
def test_rematerialisation_changes_no_number():
    features, _ = batch()
    want = training_numbers(features, NUM_FRAMES)
    got = training_numbers(features, NUM_FRAMES, dataclasses.replace(SMALL_CONFIG, remat="full"))
    assert_close(got, want, 1e-4)


def test_over_a_mesh_the_statistics_are_those_of_the_whole_batch():
    features, tree = np.random.default_rng(2).normal(size=(8, 24, 16)).astype(np.float32), random_tree()
    num_frames = np.array([24, 9, 12, 24, 5, 8, 24, 0])
    want, state = run_in_training(SMALL_CONFIG, tree, tree, features, num_frames)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put((features, num_frames), batch_sharding(mesh))
    shared = jax.device_put(tree, replicated(mesh))
    with jax.set_mesh(mesh), axis_rules():
        got, new = run_in_training(SMALL_CONFIG, shared, shared, *placed)
    np.testing.assert_allclose(got[:7], want[:7], atol=1e-5)
    assert_close(new, state, 1e-5)


def test_the_state_starts_at_mean_0_and_variance_1():
    state = init_model_state(SMALL_CONFIG)
    assert int(state["num_batches"]) == 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["norms"]):
        assert float(leaf.min()) == float(leaf.max()) == (path[-1].key == "variance")


def test_parameters_of_the_classes_come_with_speakers():
    params = jax.eval_shape(lambda key: nn.unbox(init_params(SMALL_CONFIG, key, 5)), jax.random.key(0))
    assert params["classes"].shape == (6, 5)
    assert set(params) == {"encoder", "classes"}
    assert set(jax.eval_shape(lambda key: init_params(SMALL_CONFIG, key), jax.random.key(0))) == {"encoder"}


def test_the_hash_is_of_what_decides_an_embedding():
    tree = random_tree()
    name = encoder_hash(SMALL_CONFIG, tree, tree)
    other = dataclasses.replace(SMALL_CONFIG, crop_seconds=9.0, remat="full", margin=0.3, dtype="bfloat16")
    assert encoder_hash(other, tree, tree) == name
    assert inference_config(other).remat == "none"
    assert encoder_hash(dataclasses.replace(SMALL_CONFIG, partial_segment="kernel"), tree, tree) != name
    for part in ("encoder", "norms"):
        moved = tree | {part: jax.tree.map(lambda a: a + 1e-6, tree[part])}
        assert encoder_hash(SMALL_CONFIG, moved, moved) != name


def test_bfloat16_stays_near():
    tree, config = random_tree(), SpeakerEncoderConfig(**{**dataclasses.asdict(SMALL_CONFIG), "dtype": "bfloat16"})
    features, _ = batch()
    want = np.asarray(run(SMALL_CONFIG, tree, tree, features, NUM_FRAMES))
    got = np.asarray(run(config, tree, tree, features, NUM_FRAMES))
    assert got.dtype == np.float32
    cosine = np.sum(got * want, 1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.99
