"""Polynomial sines against numpy's, in float64, with their slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.trig import cos, sin, sin_squared, sin_turns

WIDE = np.concatenate(
    [
        np.linspace(-60, 60, 200_001),
        np.linspace(-4, 4, 100_001),
        np.pi / 2 * np.arange(-30, 31),
        [0.0, -0.0, 1e-30, 1e-6],
    ]
).astype(np.float32)
FUNCTIONS = {
    sin: (np.sin, np.cos),
    cos: (np.cos, lambda z: -np.sin(z)),
    sin_squared: (lambda z: np.sin(z) ** 2, lambda z: np.sin(2 * z)),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_and_slopes(function):
    value, slope = FUNCTIONS[function]
    z = jnp.asarray(WIDE)
    exact = WIDE.astype(np.float64)
    got = jax.jit(function)(z)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, value(exact), rtol=0, atol=3e-7)
    by_jvp = jax.jit(lambda z: jax.jvp(function, (z,), (2 * jnp.ones_like(z),)))(z)
    np.testing.assert_array_equal(by_jvp[0], got)
    np.testing.assert_allclose(by_jvp[1], 2 * slope(exact), rtol=0, atol=1e-6)
    by_vjp = jax.jit(jax.grad(lambda z: jnp.sum(function(z))))(z)
    np.testing.assert_allclose(by_vjp, slope(exact), rtol=0, atol=5e-7)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_nan_and_infinity_are_told(function):
    assert np.isnan(function(jnp.asarray([np.nan, np.inf, -np.inf]))).all()


def test_zero_stays_zero():
    for function in (sin, sin_squared, sin_turns):
        assert function(jnp.zeros(1))[0] == 0
    assert cos(jnp.zeros(1))[0] == 1
    assert (sin_squared(jnp.asarray(WIDE)) >= 0).all()


def test_turns():
    rng = np.random.default_rng(0)
    turns = np.concatenate([rng.uniform(-3, 3, 100_000), np.arange(-8, 9) / 4, rng.uniform(0, 80, 100_000)]).astype(
        np.float32
    )
    got = jax.jit(sin_turns)(jnp.asarray(turns))
    np.testing.assert_allclose(got, np.sin(2 * np.pi * (turns.astype(np.float64) % 1)), rtol=0, atol=3e-7)
    assert np.abs(got).max() <= 1
    quarters = sin_turns(jnp.arange(5) / 4)
    np.testing.assert_allclose(quarters, [0, 1, 0, -1, 0], rtol=0, atol=3e-7)


def test_half_precision_stays_half():
    z = jnp.linspace(-3, 3, 50, dtype=jnp.bfloat16)
    assert sin_squared(z).dtype == jnp.bfloat16
    np.testing.assert_allclose(sin_squared(z).astype(np.float32), np.sin(np.asarray(z, np.float32)) ** 2, atol=0.05)
