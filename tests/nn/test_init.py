"""Tables of codes: variance kept, alike where FSQ digits are, stops as they were, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.init import LEVELS, SHARED, init_by_digits, num_digits, uniform_within

DIGITS, STOPS, WIDTH = 4, 3, 192
CODES = LEVELS**DIGITS
OWN = {0: jax.nn.initializers.normal(1.0), 1: uniform_within(0.25)}
STD = {0: 1.0, 1: 0.25 / 3**0.5}


def make(axis, seed=0):
    """The table with codes in rows."""
    shape = (CODES + STOPS, WIDTH) if axis == 0 else (WIDTH, CODES + STOPS)
    table = init_by_digits(OWN[axis], DIGITS, axis)(jax.random.key(seed), shape)
    assert table.shape == shape
    assert table.dtype == jnp.float32
    return np.asarray(table if axis == 0 else table.T)


@pytest.mark.parametrize("digits", range(1, 9))
def test_digits_of_codebooks(digits):
    assert num_digits(3**digits) == digits
    assert num_digits(3**digits + 1) == num_digits(3**digits - 1) == 0


def test_a_single_code_has_no_digits():
    assert num_digits(1) == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_the_variance_is_kept(axis):
    tables = np.stack([make(axis, seed) for seed in range(8)])
    np.testing.assert_allclose(tables[:, :CODES].std(), STD[axis], rtol=0.05)
    np.testing.assert_allclose(tables[:, CODES:].std(), STD[axis], rtol=0.05)
    assert abs(tables.mean()) < 0.05 * STD[axis]


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_as_alike_as_their_digits(axis):
    table = make(axis, seed=5)[:CODES]
    digits = np.arange(CODES)[:, None] // LEVELS ** np.arange(DIGITS) % LEVELS
    shared = (digits[:, None] == digits[None]).sum(-1)
    products = table @ table.T / WIDTH / STD[axis] ** 2
    found = [products[shared == count].mean() for count in range(DIGITS)]
    np.testing.assert_allclose(found, SHARED * np.arange(DIGITS) / DIGITS, atol=0.1)
    assert np.all(np.diff(found) > 0.1)
    # What is left beside a vector for each digit's value, the least squares of 3·4 indicators, is each code's own.
    onehot = np.eye(LEVELS)[digits].reshape(CODES, -1)
    rest = table - onehot @ np.linalg.lstsq(onehot, table, rcond=None)[0]
    freedom = (CODES - 1 - DIGITS * (LEVELS - 1)) / CODES
    np.testing.assert_allclose(rest.var() / STD[axis] ** 2, (1 - SHARED) * freedom, rtol=0.05)


@pytest.mark.parametrize("axis", [0, 1])
def test_stops_are_drawn_as_without_digits(axis):
    key = jax.random.key(2)
    shape = (CODES + STOPS, WIDTH) if axis == 0 else (WIDTH, CODES + STOPS)
    plain = np.asarray(OWN[axis](jax.random.split(key)[0], shape))
    np.testing.assert_array_equal(make(axis, 2)[CODES:], (plain if axis == 0 else plain.T)[CODES:])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mesh_changes_nothing(axis):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec(None, "x") if axis == 0 else jax.sharding.PartitionSpec("x")
    shape = (CODES + STOPS, WIDTH) if axis == 0 else (WIDTH, CODES + STOPS)
    init = init_by_digits(OWN[axis], DIGITS, axis)
    sharded = jax.jit(lambda key: init(key, shape), out_shardings=jax.NamedSharding(mesh, spec))(jax.random.key(3))
    assert len(sharded.sharding.device_set) == 4
    found = np.asarray(sharded if axis == 0 else sharded.T)
    np.testing.assert_allclose(found, make(axis, 3), atol=1e-5)
    np.testing.assert_array_equal(make(axis, 3), make(axis, 3))
    assert np.abs(make(axis, 4) - make(axis, 3)).max() > 0.1 * STD[axis]


def test_uniform_within_its_bound():
    values = np.asarray(uniform_within(0.3)(jax.random.key(1), (40, 50)))
    assert -0.3 <= values.min() < -0.28
    assert 0.28 < values.max() < 0.3
    assert abs(values.mean()) < 0.02
