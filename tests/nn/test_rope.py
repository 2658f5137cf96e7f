"""Rotary positions against the two-line definition."""

import jax.numpy as jnp
import numpy as np

from cv2jax.nn.rope import apply_rope, rope_angles


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def definition(x, theta):
    """x·cos + cat(-x[C/2:], x[:C/2])·sin with cos, sin of cat(f, f): the layout of spec/frontends.md 1.2."""
    dim = x.shape[-1]
    f = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    f = np.concatenate([f, f], -1)[:, None]
    rotated = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    return x * np.cos(f) + rotated * np.sin(f)


def test_equals_the_definition():
    x = draw(2, 9, 3, 8)
    np.testing.assert_allclose(apply_rope(x, rope_angles(jnp.arange(9), 8, 1e4)), definition(x, 1e4), atol=1e-5)


def test_position_zero_is_left_alone():
    x = jnp.ones((1, 1, 2, 4))
    np.testing.assert_array_equal(apply_rope(x, rope_angles(jnp.arange(1), 4, 1e4)), x)


def test_products_depend_on_the_distance_only():
    q, k = draw(2, 1, 1, 1, 8)
    products = []
    for at in (0, 5, 100):
        a = apply_rope(q, rope_angles(jnp.array([at + 3]), 8, 1e4))
        b = apply_rope(k, rope_angles(jnp.array([at]), 8, 1e4))
        products.append(float(jnp.sum(a * b)))
    np.testing.assert_allclose(products, products[0], atol=1e-5)


def test_there_is_no_longest_position():
    angles = rope_angles(jnp.array([2047, 2048, 15000]), 64, 1e4)
    np.testing.assert_allclose(angles[:, 0], [2047, 2048, 15000])
    assert bool(jnp.isfinite(angles).all())


def test_angles_may_differ_by_row():
    x = draw(2, 3, 1, 4)
    both = apply_rope(x, rope_angles(jnp.array([[0, 1, 2], [7, 8, 9]]), 4, 1e4))
    second = apply_rope(x[1:], rope_angles(jnp.array([7, 8, 9]), 4, 1e4))
    np.testing.assert_allclose(both[1:], second, atol=1e-6)


def test_dtype_is_kept():
    assert apply_rope(jnp.ones((1, 2, 1, 4), jnp.bfloat16), rope_angles(jnp.arange(2), 4, 1e4)).dtype == jnp.bfloat16
