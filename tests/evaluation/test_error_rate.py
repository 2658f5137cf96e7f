"""Error rates and codebook use against hand counts."""

import numpy as np
import pytest

from cv2jax.evaluation.codebook import codebook_use
from cv2jax.evaluation.error_rate import error_rate


def test_counts_by_hand():
    got = error_rate(["the cat sat", "one"], ["the bat", "one"])
    assert (got.character_errors, got.num_characters) == (5, 14)  # c→b, then " sat"
    assert (got.word_errors, got.num_words) == (2, 4)
    assert got.num_exact == 1
    assert got.word_accuracy == pytest.approx(0.5)
    assert got.character_error_rate == pytest.approx(5 / 14)


def test_insertions_may_exceed_one_but_accuracy_stops_at_zero():
    got = error_rate(["a"], ["b c d"])
    assert got.character_error_rate == 5
    assert got.word_accuracy == 0


def test_an_empty_reference_counts_insertions():
    assert error_rate([""], ["xy"]).character_errors == 2
    assert error_rate([], []).character_error_rate == 0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 references but 2"):
        error_rate(["a"], ["a", "b"])


def test_codebook_use_of_known_distributions():
    use = codebook_use(np.array([0, 0, 1, 1]), 6561)
    assert (use.num_codes_used, use.num_tokens) == (2, 4)
    assert use.perplexity == pytest.approx(2)
    assert use.share_used == pytest.approx(2 / 6561)
    np.testing.assert_allclose(use.digit_histogram[0], [0.5, 0.5, 0])
    np.testing.assert_allclose(use.digit_histogram[1:], [[1, 0, 0]] * 7)


def test_digit_histogram_reads_digit_zero_as_least_significant():
    use = codebook_use(np.array([2 + 3 * 1]), 6561)
    np.testing.assert_allclose(use.digit_histogram[:2], [[0, 0, 1], [0, 1, 0]])


def test_a_codebook_without_digits_and_no_tokens():
    assert codebook_use(np.array([5, 7]), 4096, levels=None).digit_histogram is None
    assert codebook_use(np.array([], np.int32), 4096, levels=None).num_codes_used == 0
