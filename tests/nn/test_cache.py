"""Ring caches against a list of what was written, and attention over them against attention over everything."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn import cache as cache_module
from cv2jax.nn.attention import attend
from cv2jax.nn.cache import EMPTY, append, attend_cached, grow, heads_first, init_cache, refill


def entries(rng, layers, rows, length):
    return tuple(jnp.asarray(rng.normal(size=(layers, rows, 2, length, 3)), jnp.float32) for _ in range(2))


def positions_of(starts, counts, size):
    places = np.arange(size)
    return jnp.asarray(np.where(places < counts[:, None], starts[:, None] + places, EMPTY), jnp.int32)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(4))
def test_pinned_positions_and_the_newest_others_are_kept(monkeypatch, seed, where):
    monkeypatch.setattr(cache_module, "platform", lambda: where)  # not all that holds there can be run here
    written_by = jax.jit(functools.partial(append))
    rng = np.random.default_rng(seed)
    rows, slots = 4, 9
    pinned = np.array([0, 2, 5, 9])
    cache, starts = init_cache(2, rows, 2, slots, 3, "float32"), np.zeros(rows, int)
    written = [{} for _ in range(rows)]
    for _ in range(6):
        size = int(rng.integers(1, 15))
        counts = rng.integers(0, size + 1, rows)
        keys, values = map(np.asarray, entries(rng, 2, rows, size))
        cache = written_by(
            cache, (keys, values), positions=positions_of(starts, counts, size), num_pinned=jnp.asarray(pinned)
        )
        for row in range(rows):
            for i in range(counts[row]):
                written[row][starts[row] + i] = (keys[:, row, :, i], values[:, row, :, i])
        starts += counts
        for row in range(rows):
            others = sorted((p for p in written[row] if p >= pinned[row]), reverse=True)[: slots - pinned[row]]
            want = [p for p in written[row] if p < pinned[row]] + others
            held = np.asarray(cache.positions)[row]
            assert sorted(held[held != EMPTY].tolist()) == sorted(want)
            for slot, position in enumerate(held.tolist()):
                if position != EMPTY:
                    np.testing.assert_array_equal(np.asarray(cache.keys)[:, row, :, slot], written[row][position][0])
                    np.testing.assert_array_equal(np.asarray(cache.values)[:, row, :, slot], written[row][position][1])


def test_growing_keeps_what_is_there():
    rng = np.random.default_rng(0)
    keys, values = entries(rng, 1, 2, 3)
    small = append(
        init_cache(1, 2, 2, 3, 3, "float32"),
        (keys, values),
        positions=jnp.array([[0, 1, 2]] * 2),
        num_pinned=jnp.zeros(2, int),
    )
    large = grow(small, 5)
    np.testing.assert_array_equal(large.positions, [[0, 1, 2, EMPTY, EMPTY]] * 2)
    np.testing.assert_array_equal(large.keys[..., :3, :], keys)
    assert grow(large, 4).positions.shape == (2, 5)


def test_a_cache_moves_into_the_memory_of_another():
    rng = np.random.default_rng(0)
    into, (keys, values) = init_cache(1, 2, 2, 7, 3, "float32"), entries(rng, 1, 2, 5)
    fill = lambda cache, keys, values, start: append(  # noqa: E731
        cache, (keys, values), positions=start + jnp.tile(jnp.arange(5), (2, 1)), num_pinned=jnp.zeros(2, int)
    )
    into = fill(fill(into, keys, values, 0), keys, values, 5)
    small = fill(init_cache(1, 2, 2, 5, 3, "float32"), values, keys, 0)
    got, want = refill(into, small), grow(small, 7)
    np.testing.assert_array_equal(got.positions, want.positions)
    np.testing.assert_array_equal(got.keys[..., :5, :], values)
    np.testing.assert_array_equal(got.values[..., :5, :], keys)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("num_old", [0, 1, 3, 4, 6, 11])
def test_attention_over_old_and_new_keys_is_attention_over_all(monkeypatch, num_old, where):
    monkeypatch.setattr(cache_module, "platform", lambda: where)
    rng, num_new, num_slots = np.random.default_rng(num_old), 3, 11
    q, k, v = (jnp.asarray(rng.normal(size=(2, num_old + num_new, 3, 4)), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random((2, 1, num_new, num_old + num_new)) < 0.6)
    mask = mask.at[..., num_old:].set(mask[..., num_old:] | jnp.eye(num_new, dtype=bool))
    cache = init_cache(2, 2, 3, num_slots, 4, "float32")
    # What slots hold that no position has is never seen, as long as it is finite.
    junk = jnp.asarray(rng.normal(size=cache.keys.shape), jnp.float32)
    keys, values = (junk.at[1, :, :, :num_old].set(heads_first(x)[:, :, :num_old]) for x in (k, v))
    positions = jnp.where(jnp.arange(num_slots) < num_old, jnp.arange(num_slots), EMPTY)
    cache = dataclasses.replace(cache, keys=keys, values=values, positions=jnp.tile(positions, (2, 1)))
    seen = jnp.concatenate([mask[..., :num_old], jnp.zeros((2, 1, num_new, num_slots - num_old), bool)], axis=-1)
    seen = jnp.concatenate([seen, mask[..., num_old:]], axis=-1)
    new = tuple(heads_first(x)[:, :, num_old:] for x in (k, v))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(functools.partial(attend_cached))(q[:, num_old:], new, cache, jnp.array(1), seen)
        np.testing.assert_allclose(got, attend(q[:, num_old:], k, v, mask=mask), atol=1e-5)
