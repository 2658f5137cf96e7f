"""Noise on speech inputs: a share of them, by speech of the same row, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.text_speech_lm.augment import replace_speech
from cv2jax.models.text_speech_lm.sequence import SPEECH, TEXT


def make_rows(share_of_text, shape=(4, 5000), seed=0):
    """Rows whose speech tokens are their own row's thousands, so that it shows where a token came from."""
    rng = np.random.default_rng(seed)
    kinds = np.where(rng.random(shape) < share_of_text, TEXT, SPEECH)
    tokens = np.where(kinds == SPEECH, 1000 * np.arange(1, shape[0] + 1)[:, None] + rng.integers(0, 900, shape), 7)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(kinds, jnp.int32)


@pytest.mark.parametrize(("share", "share_of_text"), [(0.3, 0.0), (0.5, 0.4)])
def test_a_share_of_speech_is_replaced_by_speech_of_its_row(share, share_of_text):
    tokens, kinds = make_rows(share_of_text)
    noisy = np.asarray(jax.jit(replace_speech, static_argnums=3)(tokens, kinds, jax.random.key(3), share))
    speech = np.asarray(kinds) == SPEECH
    np.testing.assert_array_equal(noisy[~speech], np.asarray(tokens)[~speech])
    np.testing.assert_array_equal(noisy[speech] // 1000, np.asarray(tokens)[speech] // 1000)
    changed = np.mean(noisy[speech] != np.asarray(tokens)[speech])
    assert changed == pytest.approx(share * (1 - share_of_text), abs=0.02)


def test_the_key_decides_and_no_share_changes_nothing():
    tokens, kinds = make_rows(0.2)
    first, again = (replace_speech(tokens, kinds, jax.random.key(1), 0.3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, replace_speech(tokens, kinds, jax.random.key(2), 0.3))
    np.testing.assert_array_equal(replace_speech(tokens, kinds, jax.random.key(1), 0.0), tokens)
