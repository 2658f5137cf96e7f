"""Cuts keep all speech, take only silence, and leave as little of the prompt to be solved again as that allows."""

import dataclasses

import numpy as np
import pytest

from cv2jax.synthesis.clip import measure_clip
from cv2jax.synthesis.trim import Cut, best_lengths, num_fed_again, plan_cut
from tests.small_model_directory import make_speech

MEASURES = measure_clip(make_speech(2.0), 16000)


def measures(first, end):
    return dataclasses.replace(MEASURES, first_speech=first, end_speech=end)


def test_tokens_fed_again_are_those_behind_the_whole_chunks_whose_look_ahead_is_there():
    lengths = [0, 3, 24, 25, 27, 28, 29, 50, 53, 78, 87]
    assert [num_fed_again(length, 25, 3) for length in lengths] == [0, 3, 24, 25, 27, 3, 4, 25, 3, 3, 12]
    assert [num_fed_again(length, 1, 3) for length in range(6)] == [0, 1, 2, 3, 3, 3]
    for length in range(1, 140):
        assert num_fed_again(length, 25, 3) == length - max(length - 3, 0) // 25 * 25


def test_the_best_lengths_lie_on_either_side():
    assert best_lengths(87, 25, 3) == (78, 103)
    assert best_lengths(78, 25, 3) == (78, 103)
    assert best_lengths(77, 25, 3) == (53, 78)
    assert best_lengths(10, 25, 3) == (3, 28)
    for low, high in (best_lengths(length, 7, 3) for length in range(4, 60)):
        assert num_fed_again(low, 7, 3) == num_fed_again(high, 7, 3) == 3


def test_without_much_silence_nothing_is_cut():
    assert plan_cut(48000, 16000, measures(0.08, 2.95), chunk=25, lookahead=3) == Cut(start=0, end=48000)
    assert plan_cut(48000, 16000, measures(0.4, 2.6)) == Cut(start=0, end=48000)


def test_more_than_half_a_second_of_silence_always_goes():
    assert plan_cut(80000, 16000, measures(1.25, 4.0)) == Cut(start=12000, end=72000)


def test_the_end_goes_first_then_the_start_and_only_as_much_as_helps():
    # 3.4 s: 85 tokens, of which 10 are fed again; 7 fewer leave 3.
    cut = plan_cut(round(3.4 * 24000), 24000, measures(0.05, 2.9), chunk=25, lookahead=3)
    assert cut == Cut(start=0, end=round(3.12 * 24000))
    cut = plan_cut(round(3.4 * 24000), 24000, measures(0.4, 3.2), chunk=25, lookahead=3)  # 0.1 s behind, 0.3 before
    assert cut == Cut(start=round(0.18 * 24000), end=round(3.3 * 24000))
    # Out of reach: what there is to cut brings it nearer all the same.
    cut = plan_cut(round(3.4 * 24000), 24000, measures(0.05, 3.18), chunk=25, lookahead=3)
    assert cut == Cut(start=0, end=round(3.28 * 24000))  # 82 tokens: 7 again


def test_a_cut_never_makes_it_worse_than_before():
    # 3.16 s: 79 tokens, 4 again; one fewer is best, two fewer would be a whole chunk more.
    cut = plan_cut(round(3.16 * 16000), 16000, measures(0.4, 2.7), chunk=25, lookahead=3)
    assert cut == Cut(start=0, end=round(3.12 * 16000))
    cut = plan_cut(round(3.08 * 16000), 16000, measures(0.05, 2.8), chunk=25, lookahead=3)  # 77: 27 again
    assert cut == Cut(start=0, end=round(2.92 * 16000))  # 73: 23 again, as few as the silence allows


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 22051, 44100])
def test_no_speech_is_lost_and_the_tokens_are_as_planned_at_any_rate(rate_hz):
    rng = np.random.default_rng(rate_hz)
    for _ in range(200):
        seconds = rng.uniform(1, 12)
        first, end = sorted(rng.uniform(0, seconds, 2))
        count, chunk = round(seconds * rate_hz), int(rng.integers(2, 60))
        at = measures(float(first), float(min(end, count / rate_hz)))
        cut = plan_cut(count, rate_hz, at, chunk=chunk, lookahead=3)
        assert 0 <= cut.start <= max(at.first_speech - 0.1, 0) * rate_hz + 1
        assert min(count, (at.end_speech + 0.1) * rate_hz) - 1 <= cut.end <= count
        plain = plan_cut(count, rate_hz, at)
        sizes = [-(-(each.end - each.start) * 24000 // rate_hz) for each in (cut, plain)]  # resampled
        tokens, before = (size // 960 for size in sizes)
        assert num_fed_again(tokens, chunk, 3) <= num_fed_again(before, chunk, 3)
        if cut != plain:  # whole tokens, at 24 kHz with the few samples that two roundings add
            assert sizes[0] - 960 * tokens <= 1 + 24000 / rate_hz * 1.5
