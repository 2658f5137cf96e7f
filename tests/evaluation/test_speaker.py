"""The equal-error rate, pairs, and what one utterance a speaker leaves to say."""

import numpy as np
import pytest

from cv2jax.evaluation import speaker
from cv2jax.evaluation.speaker import SpeakerScore, draw_scores, equal_error_rate, pair_scores


def rate(same, different):
    return equal_error_rate(np.array(same, float), np.array(different, float))


def test_scores_that_do_not_overlap_have_no_errors():
    error, threshold = rate([0.8, 0.9], [0.1, 0.2, 0.3])
    assert error == 0
    assert 0.3 <= threshold <= 0.8


def test_the_rate_is_where_misses_and_alarms_are_as_many():
    assert rate([0.2, 0.6, 0.7, 0.8], [0.1, 0.3, 0.4, 0.65])[0] == pytest.approx(0.25)
    assert rate([0.1, 0.2], [0.8, 0.9])[0] == pytest.approx(1.0)  # all wrong
    assert rate([0.5], [0.5])[0] == pytest.approx(0.5)  # no telling
    assert rate([0.5] * 10, [0.5] * 1000)[0] == pytest.approx(0.5)


def test_two_bell_curves_have_the_rate_of_theory():
    rng = np.random.default_rng(0)
    error, threshold = equal_error_rate(rng.normal(1, 1, 200_000), rng.normal(-1, 1, 300_000))
    assert error == pytest.approx(0.1587, abs=2e-3)  # the normal distribution below -1
    assert threshold == pytest.approx(0, abs=2e-2)


def test_the_rate_is_that_of_every_threshold_tried():
    rng = np.random.default_rng(1)
    same, different = rng.normal(0.4, 0.3, 300), rng.normal(0, 0.3, 500)
    gaps = [(abs(np.mean(same < t) - np.mean(different >= t)), np.mean(same < t)) for t in np.linspace(-1, 1, 20_001)]
    assert equal_error_rate(same, different)[0] == pytest.approx(min(gaps)[1], abs=4e-3)


@pytest.mark.parametrize(("same", "different"), [([], [0.1]), ([0.1], [])])
def test_without_pairs_of_both_kinds_there_is_none(same, different):
    with pytest.raises(ValueError, match="pairs of the same and of different speakers"):
        rate(same, different)


def test_pairs_are_all_of_two_utterances_once_and_sizes_do_not_count():
    vectors = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]], np.float32)
    same, different = pair_scores(vectors, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(sorted(same), [0, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(sorted(different), [-1, -(0.5**0.5), 0, 0.5**0.5], atol=1e-6)


def score_of(vectors, speakers, usable=None):
    names = [f"s{i}" for i in range(10)]
    score, count = SpeakerScore(names), len(vectors)
    usable = np.ones(count, bool) if usable is None else np.array(usable)
    half = count // 2
    for rows in (slice(0, half), slice(half, count)):
        score.add(
            np.array(vectors, np.float32)[rows], np.array(speakers)[rows], np.ones(count, bool)[rows], usable[rows]
        )
    score.add(
        np.ones((2, np.shape(vectors)[1]), np.float32), np.array([9, 9]), np.zeros(2, bool), np.ones(2, bool)
    )  # only fill a batch
    return score.metrics()


def test_metrics_of_voices_that_are_told_apart():
    found = score_of([[1, 0.1], [0.1, 1], [1, 0], [0, 1], [-1, 0]], [0, 1, 0, 1, 4])
    assert found["eer"] == 0
    assert (found["num_same_pairs"], found["num_different_pairs"], found["num_utterances"]) == (2, 8, 5)
    assert found["same_cosine"] > 0.9 > found["different_cosine"]
    assert (found["num_speakers"], found["num_lone_speakers"], found["lone_speakers"]) == (3, 1, ["s4"])
    for shares in found["score_distribution"].values():
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_without_a_speaker_twice_there_is_no_rate_but_all_else():
    found = score_of([[1, 0], [0, 1], [1, 1]], [0, 1, 2])
    assert "eer" not in found
    assert found["num_lone_speakers"] == 3
    assert found["num_same_pairs"] == 0
    assert draw_scores(found["score_distribution"]).startswith(b"\x89PNG")


def test_silent_and_broken_rows_are_counted_and_left_out():
    vectors = [[1, 0], [1, 0], [np.nan, 0], [0, 1]]
    found = score_of(vectors, [0, 0, 1, 1], usable=[True, True, True, False])
    assert (found["num_left_out"], found["num_utterances"]) == (2, 2)


def test_of_many_utterances_whole_speakers_are_compared(monkeypatch):
    monkeypatch.setattr(speaker, "MAX_UTTERANCES", 6)
    found = score_of(np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 5)
    assert found["num_same_pairs"] + found["num_different_pairs"] == 15
    assert found["num_same_pairs"] == 6 + 1  # one speaker's four and two of the next


def test_the_picture_shows_where_as_many_of_either_err():
    distribution = {"same": [0.5] * 2 + [0.0] * 78, "different": [0.0] * 79 + [1.0]}
    assert len(draw_scores(distribution, 0.5)) > len(draw_scores(distribution)) > 1000
