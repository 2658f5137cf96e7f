"""Metrics of a flow by hand, and its pictures."""

import io

import numpy as np
import pytest
from matplotlib import image

from cv2jax.evaluation.flow import KINDS, FlowScore, TokenMeans, draw_spectrograms


def batch(**changes):
    mel = np.zeros((2, 6, 3), np.float32)
    fields = {
        "error": np.array([[1, 3, 9, 9, 9, 9], [5, 5, 5, 5, 9, 9]], np.float32),
        "time": np.array([0.1, 0.99], np.float32),
        "mask_index": np.array([0, 1]),
        "speech_tokens": np.array([[1, 0, 0], [2, 1, 0]]),
        "num_tokens": np.array([1, 2]),
        "truth": mel,
        "offline": mel + 2,
        "streamed": mel + 3,
    }
    return fields | changes


def test_means_are_over_frames_of_tokens_that_are_there():
    score = FlowScore((0, 25))
    score.add(batch())
    score.add(batch(num_tokens=np.array([0, 0])))
    got = score.metrics()
    assert got["loss"] == pytest.approx((1 + 3 + 4 * 5) / 6)
    assert got["loss_time_0"] == got["loss_mask_0_chunk_0"] == 2
    assert got["loss_time_4"] == got["loss_mask_1_chunk_25"] == 5
    assert (got["offline_mel_l1"], got["streamed_mel_l1"], got["streamed_difference"]) == (2, 3, 1)
    assert "offline_ratio" not in got
    assert len(got["spectrograms"]) == 2


def test_the_baseline_is_the_mean_of_a_token_where_it_was_seen():
    means = TokenMeans(3, 3)
    mel = np.arange(4, dtype=np.float32)[None, :, None] * np.ones((1, 1, 3), np.float32)
    means.add(np.array([[1, 1, 0]]), np.array([2]), np.concatenate([mel, 99 * mel[:, :2]], axis=1))
    constant, seen = means.mel(np.array([1, 2]))
    np.testing.assert_array_equal(constant[:2], np.full((2, 3), 1.5))
    np.testing.assert_array_equal(seen, [True, True, False, False])
    score = FlowScore((0, 25), means)
    score.add(batch())
    got = score.metrics()
    assert got["seen_share"] == pytest.approx(4 / 6)
    assert got["constant_mel_l1"] == 1.5
    assert got["offline_ratio"] == pytest.approx(2 / 1.5)
    assert got["streamed_ratio"] == pytest.approx(3 / 1.5)


def test_pictures_show_each_kind_of_each_utterance():
    score = FlowScore((0, 25))
    score.add(batch())
    packed = score.metrics()["spectrograms"]
    png = image.imread(io.BytesIO(draw_spectrograms(packed)))
    assert png.shape[1] > png.shape[0] > 300
    assert set(packed[0]) == {"shape", *KINDS}
    other = batch(streamed=batch()["truth"] - 11)
    score = FlowScore((0, 25))
    score.add(other)
    assert draw_spectrograms(score.metrics()["spectrograms"]) != draw_spectrograms(packed)
