"""The EMA codebook against numpy, on one device and on eight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cv2jax.models.speech_tokenizer import vq

KEY = jax.random.key(0)


@pytest.fixture
def state():
    """A codebook of 6 vectors of width 3, already used."""
    rng = np.random.default_rng(0)
    counts, codebook = rng.uniform(0.5, 3, 6), rng.normal(size=(6, 3))
    parts = (codebook, counts, codebook * counts[:, None])
    return vq.VqState(*(jnp.asarray(part, jnp.float32) for part in parts))


@pytest.fixture
def batch():
    vectors = vq.normalize(jax.random.normal(jax.random.key(1), (8, 5, 3)))
    return vectors, jnp.arange(5)[None] < jnp.arange(8)[:, None] % 6


def numpy_update(state, vectors, mask, decay):
    codebook, counts, sums = (np.array(a, np.float64) for a in (state.codebook, state.counts, state.sums))
    x = np.asarray(vectors)[np.asarray(mask)]
    ids = ((x[:, None] - codebook[None]) ** 2).sum(-1).argmin(1)
    new_counts, new_sums = np.zeros_like(counts), np.zeros_like(sums)
    for vector, index in zip(x, ids, strict=True):
        new_counts[index] += 1
        new_sums[index] += vector
    counts = decay * counts + (1 - decay) * new_counts
    sums = decay * sums + (1 - decay) * new_sums
    smoothed = (counts + 1e-5) / (counts.sum() + len(counts) * 1e-5) * counts.sum()
    return sums / smoothed[:, None], counts, sums


def test_nearest_code_is_the_smallest_distance(state, batch):
    vectors, _ = batch
    distance = ((np.asarray(vectors)[:, :, None] - np.asarray(state.codebook)) ** 2).sum(-1)
    np.testing.assert_array_equal(vq.nearest_codes(vectors, state.codebook), distance.argmin(-1))


def test_normalize_has_unit_rms_and_the_direction_of_its_input():
    x = jax.random.normal(KEY, (2, 3, 16)) * 7
    y = np.asarray(vq.normalize(x))
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        y / np.linalg.norm(y, axis=-1, keepdims=True), x / jnp.linalg.norm(x, axis=-1, keepdims=True), atol=1e-5
    )


def test_update_equals_numpy(state, batch):
    vectors, mask = batch
    ids = vq.nearest_codes(vectors, state.codebook)
    new = vq.update_vq_state(state, vectors, ids, mask, KEY, decay=0.9)
    for got, want in zip((new.codebook, new.counts, new.sums), numpy_update(state, vectors, mask, 0.9), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_padded_positions_do_not_count(state, batch):
    vectors, mask = batch
    ids = vq.nearest_codes(vectors, state.codebook)
    want = vq.update_vq_state(state, vectors, ids, mask, KEY, decay=0.9)
    dirty = jnp.where(mask[..., None], vectors, 1e3)
    got = vq.update_vq_state(state, dirty, jnp.where(mask, ids, 5), mask, KEY, decay=0.9)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_empty_batch_leaves_the_state_alone(state, batch):
    vectors, mask = batch
    ids = vq.nearest_codes(vectors, state.codebook)
    new = vq.update_vq_state(state, vectors, ids, mask & False, KEY, decay=0.9, restart_below=9.0)
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_unused_codes_keep_their_vector(batch):
    vectors, mask = batch
    fresh = nn.unbox(vq.init_vq_state(16, 3, KEY))
    far = fresh.replace(codebook=fresh.codebook.at[3:].set(100.0))
    new = vq.update_vq_state(far, vectors, vq.nearest_codes(vectors, far.codebook), mask, KEY, decay=0.9)
    np.testing.assert_array_equal(new.codebook[3:], 100.0)
    assert float(new.counts.sum()) == pytest.approx(int(mask.sum()))  # the first update is not decayed


def test_restart_moves_dead_codes_onto_the_batch(batch):
    vectors, mask = batch
    fresh = nn.unbox(vq.init_vq_state(16, 3, KEY))
    far = fresh.replace(codebook=fresh.codebook.at[3:].set(100.0))
    ids = vq.nearest_codes(vectors, far.codebook)
    new = vq.update_vq_state(far, vectors, ids, mask, KEY, decay=0.9, restart_below=0.5)
    valid = np.asarray(vectors)[np.asarray(mask)]
    for code in np.asarray(new.codebook[3:]):
        assert np.abs(valid - code).max(-1).min() < 1e-6
    np.testing.assert_allclose(new.counts[3:], 0.5)
    np.testing.assert_allclose(new.sums[3:], new.codebook[3:] * 0.5)


def test_first_batch_initialises_and_later_ones_do_not(state, batch):
    vectors, mask = batch
    fresh = nn.unbox(vq.init_vq_state(16, 3, KEY))
    filled = vq.init_from_data(fresh, vectors, mask, KEY)
    valid = np.asarray(vectors)[np.asarray(mask)]
    for code in np.asarray(filled.codebook):
        assert np.abs(valid - code).max(-1).min() == 0
    np.testing.assert_array_equal(vq.init_from_data(fresh, vectors, mask & False, KEY).codebook, fresh.codebook)
    np.testing.assert_array_equal(vq.init_from_data(state, vectors, mask, KEY).codebook, state.codebook)


def test_sharded_batch_gives_the_same_state(state, batch):
    """Sums run over the global batch, not over a device's share."""
    vectors, mask = batch

    def step(state, vectors, mask):
        state = vq.init_from_data(state, vectors, mask, KEY)
        ids = vq.nearest_codes(vectors, state.codebook)
        return vq.update_vq_state(state, vectors, ids, mask, KEY, decay=0.9, restart_below=0.6)

    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    fresh = nn.unbox(vq.init_vq_state(6, 3, KEY))
    for start in (state, fresh):
        want = jax.jit(step)(start, vectors, mask)
        sharded = jax.jit(step, in_shardings=(everywhere, rows, rows), out_shardings=everywhere)
        got = sharded(*jax.device_put((start, vectors, mask), (everywhere, rows, rows)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_quantize_is_straight_through_with_a_masked_commitment(state, batch):
    vectors, mask = batch
    codes, ids, commitment = vq.quantize(vectors, mask, state.codebook)
    np.testing.assert_allclose(codes, state.codebook[ids], atol=1e-6)
    distance = ((np.asarray(vectors) - np.asarray(state.codebook)[np.asarray(ids)]) ** 2).mean(-1)
    assert float(commitment) == pytest.approx(distance[np.asarray(mask)].mean(), rel=1e-5)
    grad = jax.grad(lambda v: jnp.sum(vq.quantize(v, mask, state.codebook)[0] * 3))(vectors)
    np.testing.assert_allclose(grad, 3.0)
    grad = jax.grad(lambda c: jnp.sum(vq.quantize(vectors, mask, c)[0]))(state.codebook)
    np.testing.assert_array_equal(grad, 0)


def test_state_is_boxed_with_logical_axes():
    boxed = vq.init_vq_state(8, 4, KEY)
    assert boxed.codebook.names == ("codebook", "embed")
    assert boxed.counts.names == ("codebook",)
