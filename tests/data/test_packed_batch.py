"""The packed batch: each utterance whole and at its place, its coin a function of seed, epoch and utterance alone."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.packed_batch import bistream_coins, pack_rows
from cv2jax.models.text_speech_lm import sequence


def test_coins_are_frozen_and_belong_to_the_utterance() -> None:
    utterances = np.arange(1000)
    coins = bistream_coins(7, 2, utterances)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(bistream_coins(7, 2, order), coins[order])
    np.testing.assert_array_equal(bistream_coins(7, 2, utterances[700:701]), coins[700:701])
    # Written down once: a change would silently lay out every resumed run in another way.
    np.testing.assert_allclose(coins[:3], [0.8595212392934799, 0.28153159477851475, 0.3984901527203333], rtol=1e-12)


def test_coins_are_uniform_and_independent() -> None:
    utterances = np.arange(40_000)
    streams = [bistream_coins(seed, epoch, utterances) for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1))]
    streams += [np.roll(streams[0], 1), utterances / 40_000]
    for i, left in enumerate(streams):
        assert left.min() >= 0
        assert left.max() < 1
        for right in streams[:i]:
            cells = np.histogram2d(left, right, bins=16, range=[(0, 1), (0, 1)])[0]
            expected = 40_000 / 256
            chi_square = ((cells - expected) ** 2 / expected).sum()
            assert 130 < chi_square < 400  # 255 degrees of freedom: mean 255, deviation 23


def laid_out(index: int, length: int) -> sequence.Row:
    return sequence.Row(*np.random.default_rng(index).integers(1, 1000, (3, length)).astype(np.int32))


def test_packed_rows_hold_each_utterance_whole() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 13, 300)
    rows = np.split(random.permutation(300)[:93], np.cumsum(random.integers(0, 6, 30)).clip(max=93))
    rows = [row[:5] for row in rows]
    batch = pack_rows([[laid_out(i, lengths[i]) for i in row] for row in rows], rows, length=64, max_segments=5)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        **dict.fromkeys(("token", "kind", "targets", "positions", "segments"), ((31, 64), np.dtype(np.int32))),
        "utterance": ((31, 5), np.dtype(np.int32)),
    }
    for b, row in enumerate(rows):
        assert batch["utterance"][b].tolist() == row.tolist() + [-1] * (5 - len(row))
        start = 0
        for number, index in enumerate(row, 1):
            part = slice(start, start + lengths[index])
            for name, values in vars(laid_out(index, lengths[index])).items():
                np.testing.assert_array_equal(batch[name][b, part], values)
            assert batch["positions"][b, part].tolist() == list(range(lengths[index]))
            assert set(batch["segments"][b, part].tolist()) == {number}
            start = part.stop
        assert not any(batch[name][b, start:].any() for name in ("token", "kind", "positions", "segments"))
        assert (batch["targets"][b, start:] == sequence.IGNORE).all()


@pytest.mark.parametrize(("length", "max_segments"), [(19, 2), (64, 1)])
def test_a_row_that_does_not_fit_is_named(length: int, max_segments: int) -> None:
    rows = [[laid_out(0, 3)], [laid_out(1, 10), laid_out(2, 10)]]
    with pytest.raises(UserError, match=r"^packed row 1: 2 utterances of 20 positions"):
        pack_rows(rows, [np.array([0]), np.array([1, 2])], length=length, max_segments=max_segments)
