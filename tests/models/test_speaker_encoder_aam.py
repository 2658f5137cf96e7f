"""AAM-softmax against its definition: the margin on the label's angle, the fallback, the schedule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speaker_encoder.aam import aam_logits, aam_loss, margin_at

LABELS = jnp.array([1, 0, 2, 2])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)


def cosines(embedding, classes):
    return (embedding / np.linalg.norm(embedding, axis=1, keepdims=True)) @ (classes / np.linalg.norm(classes, axis=0))


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_logits_are_those_of_the_shifted_angle(margin):
    embedding, classes = draw()
    logits, cosine = aam_logits(embedding, classes, LABELS, jnp.float32(margin), 32.0)
    want = np.array(cosines(embedding, classes))
    np.testing.assert_allclose(cosine, want, atol=1e-6)
    for row, label in enumerate(LABELS.tolist()):
        angle = np.arccos(want[row, label])
        assert angle < np.pi - margin  # none of these falls back
        want[row, label] = np.cos(angle + margin)
    np.testing.assert_allclose(logits, 32 * want, atol=1e-3)


def test_beyond_pi_the_margin_is_a_constant_so_that_logits_keep_falling():
    classes, margin = jnp.eye(2), 0.4
    angles = np.linspace(0, np.pi, 50)
    embedding = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    logits, _ = aam_logits(embedding, classes, jnp.zeros(50, jnp.int32), jnp.float32(margin), 1.0)
    want = np.where(angles < np.pi - margin, np.cos(angles + margin), np.cos(angles) - (1 + np.cos(np.pi - margin)))
    np.testing.assert_allclose(np.asarray(logits)[:, 0], want, atol=2e-3)
    assert np.all(np.diff(np.asarray(logits)[:, 0])[angles[1:] < np.pi - margin] < 1e-6)


def test_the_loss_is_the_cross_entropy_and_counts_the_nearest_class():
    embedding, classes = draw(1)
    loss, right = aam_loss(embedding, classes, LABELS, jnp.float32(0.3), 8.0)
    logits, cosine = map(np.asarray, aam_logits(embedding, classes, LABELS, jnp.float32(0.3), 8.0))
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(probability[np.arange(4), np.asarray(LABELS)]), rtol=1e-4)
    np.testing.assert_array_equal(right, cosine.argmax(1) == np.asarray(LABELS))


def test_neither_size_of_embedding_nor_of_class_counts_and_gradients_stay_finite():
    embedding, classes = draw(2)
    total = lambda e, c: jnp.sum(aam_loss(e, c, LABELS, jnp.float32(0.2), 32.0)[0])  # noqa: E731
    assert float(total(3 * embedding, 0.1 * classes)) == pytest.approx(float(total(embedding, classes)), rel=1e-5)
    aligned = jnp.concatenate([classes.T, jnp.zeros((1, 5))])  # cosines of exactly 1, and no direction at all
    gradients = jax.grad(total, (0, 1))(aligned, classes)
    assert all(np.isfinite(g).all() for g in gradients)


def test_the_margin_grows_between_its_two_steps():
    schedule = lambda step: float(margin_at(jnp.int32(step), margin=0.2, start=10, end=20))  # noqa: E731
    assert schedule(0) == schedule(10) == 0
    grown = [schedule(step) for step in range(10, 21)]
    assert all(b > a for a, b in itertools.pairwise(grown))
    assert schedule(15) == pytest.approx(0.2 * (1 - 1e-3**0.5), rel=1e-4)
    assert schedule(20) == schedule(10**6) == pytest.approx(0.2)
    assert float(margin_at(jnp.int32(0), margin=0.2, start=0, end=0)) == pytest.approx(0.2)  # at once
