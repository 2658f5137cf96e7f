"""FSQ: ids, digits, thresholds and the straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer import fsq


def test_all_6561_ids_round_trip():
    ids = jnp.arange(3**8, dtype=jnp.int32)
    digits = fsq.ids_to_digits(ids, 8)
    assert digits.shape == (6561, 8)
    assert set(np.unique(digits)) == {-1.0, 0.0, 1.0}
    assert len(np.unique(np.asarray(digits), axis=0)) == 6561
    np.testing.assert_array_equal(fsq.digits_to_ids(digits), ids)


def test_digit_zero_is_least_significant():
    digits = jnp.where(jnp.eye(9, 8, dtype=bool), 0.0, -1.0)
    np.testing.assert_array_equal(fsq.digits_to_ids(digits), [*(3**i for i in range(8)), 0])


def test_all_zero_digits_are_id_3280():
    assert int(fsq.digits_to_ids(jnp.zeros(8))) == 3280


def test_ids_are_int32():
    assert fsq.digits_to_ids(jnp.zeros((2, 8))).dtype == jnp.int32


@pytest.mark.parametrize(("z", "digit"), [(0.5498, 0), (0.5501, 1), (-0.5498, 0), (-0.5501, -1), (50.0, 1), (0.0, 0)])
def test_rounding_threshold(z, digit):
    assert float(jnp.round(fsq.bound(jnp.float32(z)[None]))[0]) == digit


def test_halves_round_to_even():
    np.testing.assert_array_equal(fsq.round_straight_through(jnp.array([0.5, -0.5, 1.5])), [0.0, -0.0, 2.0])


def test_gradient_passes_through_the_rounding_only():
    z = jnp.array([0.3, -1.2, 0.0, 2.5])
    got = jax.grad(lambda z: jnp.sum(fsq.round_straight_through(fsq.bound(z)) * jnp.arange(1.0, 5.0)))(z)
    np.testing.assert_allclose(got, np.arange(1, 5) * 0.999 * (1 - np.tanh(np.asarray(z)) ** 2), rtol=1e-5)


def test_module_projects_in_float32_even_for_bfloat16_hidden():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16)).astype(jnp.bfloat16)
    quantizer = fsq.FiniteScalarQuantizer(16, 8)
    (z, digits, ids), variables = quantizer.init_with_output(jax.random.key(1), hidden)
    down = variables["params"]["project_down"]
    want = np.asarray(hidden, np.float32) @ np.asarray(down["kernel"].value)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, want, atol=1e-5)
    np.testing.assert_allclose(digits, np.round(0.999 * np.tanh(want)), atol=1e-6)
    np.testing.assert_allclose(fsq.ids_to_digits(ids, 8), digits, atol=1e-6)


def test_balanced_digits_are_equally_likely_and_cost_nothing():
    z = fsq.BALANCED_STD * jax.random.normal(jax.random.key(0), (8, 4000, 8))
    levels = np.asarray(jnp.round(fsq.bound(z)))
    np.testing.assert_allclose([(levels == level).mean() for level in (-1, 0, 1)], 1 / 3, atol=0.01)
    assert float(fsq.digit_balance_loss(z, jnp.ones((8, 4000), bool))) < 1e-3


def test_balance_loss_is_the_gaussian_divergence_of_the_true_positions():
    z = 0.7 + 2.0 * jax.random.normal(jax.random.key(0), (3, 50, 8))
    mask = jnp.arange(50) < jnp.array([50, 20, 0])[:, None]
    got, grad = jax.value_and_grad(fsq.digit_balance_loss)(jnp.where(mask[..., None], z, jnp.nan), mask)
    kept = np.asarray(z, np.float64)[np.asarray(mask)]
    mean, std, want = kept.mean(0), kept.std(0), fsq.BALANCED_STD
    divergence = np.log(want / std) + (std**2 + mean**2) / (2 * want**2) - 0.5  # KL of two Gaussians, textbook form
    np.testing.assert_allclose(float(got), divergence.mean(), rtol=1e-5)
    assert np.isfinite(grad).all()
    assert not np.any(np.asarray(grad)[~np.asarray(mask)])
    assert np.any(np.asarray(grad)[np.asarray(mask)])


@pytest.mark.parametrize(("fill", "num_valid"), [(30.0, 4), (0.0, 4), (1.0, 0)])
def test_balance_loss_is_finite_where_nothing_moves_or_counts(fill, num_valid):
    z, mask = jnp.full((2, 4, 8), fill), jnp.broadcast_to(jnp.arange(4) < num_valid, (2, 4))
    value, grad = jax.value_and_grad(fsq.digit_balance_loss)(z, mask)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert float(value) > 1 if num_valid else float(value) == 0


def test_a_step_against_the_balance_loss_frees_saturated_digits():
    z, mask = 4.0 + jax.random.normal(jax.random.key(0), (4, 50, 8)), jnp.ones((4, 50), bool)
    assert set(np.unique(np.round(fsq.bound(z)))) <= {0.0, 1.0}
    for _ in range(200):
        z = z - 100.0 * jax.grad(fsq.digit_balance_loss)(z, mask)
    levels = np.asarray(jnp.round(fsq.bound(z)))
    np.testing.assert_allclose([(levels == level).mean() for level in (-1, 0, 1)], 1 / 3, atol=0.1)
