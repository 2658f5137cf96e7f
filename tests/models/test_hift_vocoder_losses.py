"""The adversarial losses: the official numbers, and their definitions where those are saturated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.hift_vocoder.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    lower_medians,
    tpr_loss,
)
from tests.models.golden_discriminators import GOLDENS


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDENS / "gan_losses.npz"))


def split(stacked):
    return [jnp.asarray(a) for a in stacked]


def test_the_official_numbers(golden):
    real, generated = split(golden["dr"]), split(golden["dg"])
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5)  # noqa: E731
    close(adversarial_loss(generated), golden["gen"])
    close(discriminator_loss(real, generated), golden["disc"])
    # Upstream hands the same arrays over as feature maps, one list a discriminator.
    close(feature_matching_loss([[r] for r in real], [[g] for g in generated]), golden["fm"])
    close(tpr_loss(real, generated), golden["tpr_disc"])
    close(tpr_loss(generated, real), golden["tpr_gen"])


def slow_tpr(real, generated, threshold):
    total = 0.0
    for r, g in zip(real, generated, strict=True):
        difference = (np.asarray(r, np.float64) - np.asarray(g, np.float64)).ravel()
        median = sorted(difference)[(len(difference) - 1) // 2]
        below = [(d - median) ** 2 for d in difference if d < median]
        total += threshold - max(threshold - np.mean(below), 0) if below else 0.0
    return total


@pytest.mark.parametrize(("scale", "saturated"), [(1.0, True), (0.05, False)])
def test_the_relative_loss_and_its_slope_follow_the_definition(golden, scale, saturated):
    real, generated = split(scale * golden["dr"]), split(scale * golden["dg"])
    for a, b in ((real, generated), (generated, real)):
        np.testing.assert_allclose(tpr_loss(a, b), slow_tpr(a, b, 0.04), rtol=1e-5)
        gradient = jax.grad(lambda first, second=b: tpr_loss(first, second))(a)
        for which, slope in enumerate(gradient):
            assert (jnp.abs(slope).max() == 0) == saturated
            step = 1e-4 * scale * np.sign(slope)
            moved = [np.float64(x) + (step * sign if i == which else 0) for sign in (1, -1) for i, x in enumerate(a)]
            change = slow_tpr(moved[:3], b, 0.04) - slow_tpr(moved[3:], b, 0.04)
            np.testing.assert_allclose(change / (2e-4 * scale), np.abs(slope).sum(), rtol=2e-3, atol=1e-6)


def test_the_relative_loss_of_equal_scores_is_nothing():
    scores = [jnp.ones((2, 3))]
    value, gradient = jax.value_and_grad(lambda r: tpr_loss(r, scores))(scores)
    assert value == 0
    assert gradient[0].tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([3.0, 1.0, 2.0, 4.0], 2.0),
        ([5.0, 1.0, 3.0], 3.0),
        ([7.0], 7.0),
        ([-3.0, -1e-30, -2.0, 1e-40, 5.0, -1e9], -2.0),
        ([0.5, 2.0, 0.5, 0.5], 0.5),
    ],
)
def test_the_lower_median_is_torchs_and_one_element_moves_it(values, median):
    x, beside = jnp.asarray(values), jnp.asarray([1.0, 9.0])
    value, gradient = jax.value_and_grad(lambda x: lower_medians([beside, x, beside])[1])(x)
    assert value == median
    np.testing.assert_allclose(gradient, (x == median) / jnp.sum(x == median))
    np.testing.assert_array_equal(lower_medians([x, beside])[1], 1.0)


@pytest.mark.parametrize("size", [999, 1000])
def test_the_lower_median_of_many_is_the_sorted_ones(size):
    x = np.random.default_rng(size).standard_normal((size // 10, 10)).astype(np.float32) * 1e-3
    assert jax.jit(lower_medians)([x])[0] == np.sort(x.ravel())[(x.size - 1) // 2]


def test_the_least_squares_know_their_targets():
    ones, zeros = [jnp.ones((2, 5))] * 3, [jnp.zeros((2, 4))] * 3
    assert adversarial_loss(ones) == 0
    assert adversarial_loss(zeros) == 3
    assert discriminator_loss(ones, zeros) == 0
    assert discriminator_loss(zeros, ones) == 6


def test_feature_maps_count_alike_whatever_their_size():
    real = [[jnp.zeros((2, 7, 3)), jnp.zeros((2, 1))], [jnp.zeros((2, 2, 2, 2))]]
    generated = jax.tree.map(jnp.ones_like, real)
    assert feature_matching_loss(real, generated) == 2 * 3
    with pytest.raises(ValueError, match="zip"):
        feature_matching_loss(real, generated[:1])


def test_half_precision_is_summed_in_fp32():
    features = [[jnp.full((64, 100), 0.1, jnp.bfloat16)]]
    loss = feature_matching_loss(features, jax.tree.map(jnp.zeros_like, features))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 2 * float(jnp.bfloat16(0.1)), rtol=1e-6)
