"""Signals: where elements stand, what is kept from chunk to chunk, and stacks whose branches are late by different amounts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.signal import ENDLESS, Chunk, Signal, Whole, add
from tests.nn.chunked import Chunked, alone, whole

LENGTHS = [9, 1, 2, 5]


def counts(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def make_values(num: int, rows: int = 1, width: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, num, width), np.float32)


def window_sum(extent, signal, size, left, *, stride=1, extra=None):
    """The simplest convolution."""
    values, empty = extent.extend(signal, size, left, stride=stride, extra=extra)
    num = (values.shape[1] - size) // stride + 1
    total = sum(values[:, i : i + stride * (num - 1) + 1 : stride] for i in range(size))
    return extent.mask(empty.holding(total))


def test_whole_utterances_have_their_places():
    signal = Signal(jnp.ones((2, 6, 3)), 2)
    np.testing.assert_array_equal(Whole().positions(signal)[0], np.arange(6))
    np.testing.assert_array_equal(Whole().last(signal), [5, 5])
    assert Whole().mask(signal) is signal
    some = Whole(counts(1, 3))
    np.testing.assert_array_equal(some.last(signal), [1, 5])
    np.testing.assert_array_equal(some.mask(signal).values[..., 0], [[1, 1, 0, 0, 0, 0], [1] * 6])
    longer = Signal(jnp.ones((2, 7, 3)), 2, extra=1)
    np.testing.assert_array_equal(some.last(longer), [2, 6])
    np.testing.assert_array_equal(some.mask(longer).values[0, :, 0], [1, 1, 1, 0, 0, 0, 0])
    assert Whole().carry("start") == "start"
    assert Whole().keep(None, signal) is None


def test_a_mask_takes_nan_away():
    signal = Signal(jnp.full((1, 4, 1), jnp.nan), 1)
    np.testing.assert_array_equal(Whole(counts(0)).mask(signal).values, np.zeros((1, 4, 1)))
    chunk = Chunk(None, counts(5), counts(4), counts(5))
    np.testing.assert_array_equal(chunk.mask(signal).values, np.zeros((1, 4, 1)))


def test_chunks_have_their_places():
    chunk = Chunk(None, counts(3, 0), counts(2, 2), counts(4, ENDLESS))
    signal = Signal(jnp.ones((2, 4, 1)), 2, delay=3, extra=1)
    np.testing.assert_array_equal(chunk.positions(signal), [[3, 4, 5, 6], [-3, -2, -1, 0]])
    np.testing.assert_array_equal(chunk.last(signal), [8, 2 * ENDLESS])
    np.testing.assert_array_equal(chunk.mask(signal).values[..., 0], [[1, 1, 1, 1], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("size", "left", "stride", "delay", "before"),
    [
        (3, 1, 1, 0, 1),
        (3, 2, 1, 0, 0),
        (3, 0, 1, 0, 2),
        (7, 3, 1, 2, 5),
        (6, 1, 3, 0, 1),
        (6, 1, 3, 4, 2),
        (1, 0, 1, 0, 0),
    ],
)
def test_how_late_an_output_is(size, left, stride, delay, before):
    chunk = Chunk(None, counts(0), counts(2), counts(2))
    signal = Signal(jnp.ones((1, 6, 1)), 3, delay=delay)
    values, empty = chunk.extend(signal, size, left, stride=stride)
    assert (empty.delay, empty.rate, empty.extra, empty.values.shape[1]) == (before, 3 // stride, 0, 0)
    assert values.shape[1] == 6 - stride + size  # as many outputs as inputs / stride
    [tail] = chunk.tails
    assert tail.shape[1] == stride * before + left - delay
    np.testing.assert_array_equal(
        tail[0, :, 0], np.ones(6 + 20)[:0].tolist() + [0.0] * max(tail.shape[1] - 6, 0) + [1.0] * min(tail.shape[1], 6)
    )


def test_the_tail_is_that_of_the_valid_frames():
    signal = Signal(jnp.arange(1.0, 9)[None, :, None], 2)
    chunk = Chunk([jnp.asarray([[[-2.0], [-1.0]]])], counts(7), counts(1), counts(ENDLESS))
    values, _ = chunk.extend(signal, 3, 2)
    np.testing.assert_array_equal(values[0, :, 0], [-2, -1, *range(1, 9)])
    np.testing.assert_array_equal(chunk.tails[0][0, :, 0], [1, 2])
    none = Chunk([jnp.asarray([[[-2.0], [-1.0]]])], counts(7), counts(0), counts(ENDLESS))
    none.extend(signal, 3, 2)
    np.testing.assert_array_equal(none.tails[0][0, :, 0], [-2, -1])  # no frames: as it was


def test_delaying_costs_nothing_where_nothing_is_late():
    chunk, signal = Chunk(None, counts(0), counts(3), counts(3)), Signal(jnp.ones((1, 3, 1)), 1, delay=2)
    assert chunk.delay(signal, 2) is signal
    assert chunk.tails == []
    later = chunk.delay(signal, 4)
    assert later.delay == 4
    np.testing.assert_array_equal(later.values[0, :, 0], [0, 0, 1])


def test_histories_are_kept_behind_the_last_valid_frame():
    signal = Signal(jnp.zeros((2, 4, 1)), 2)
    history = {"sum": jnp.asarray([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])}
    chunk = Chunk([{"sum": counts(7, 8)}], counts(0, 0), counts(2, 1), counts(9, 9))
    np.testing.assert_array_equal(chunk.carry("initial")["sum"], [7, 8])
    chunk.keep(history, signal)
    np.testing.assert_array_equal(chunk.tails[0]["sum"], [4, 12])
    assert Chunk(None, counts(0), counts(1), counts(1)).carry("initial") == "initial"


def test_a_copy_of_the_second_element_goes_in_front():
    signal = Whole().reflect_start(Signal(jnp.arange(5.0)[None, :, None], 1))
    assert signal.extra == 1
    np.testing.assert_array_equal(signal.values[0, :, 0], [1, 0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("late", "rate"),
    [
        pytest.param(late, rate, marks=() if rate == 3 + late else pytest.mark.full)
        for late in range(5)
        for rate in (3, 4, 5, 12)
    ],
)
def test_the_copy_in_front_streams_from_any_delay(rate, late):
    def apply(extent, signal):
        return extent.reflect_start(window_sum(extent, signal, 1 + late, 0))

    values = make_values(rate * max(LENGTHS), len(LENGTHS))
    chunked = Chunked(apply, rate, block=2)
    streams = [chunked(values, LENGTHS, seed) for seed in range(3)]
    assert chunked.extra == 1
    assert late - 1 <= chunked.delay <= late + 1  # no more than two elements of waiting
    for row, length in enumerate(LENGTHS):
        want = alone(apply, values[row, : rate * length], rate)
        for made in streams:
            np.testing.assert_allclose(made[row], want, rtol=0, atol=1e-6)


def branches(extent, signal):
    """Two of different delays and a third that comes before both, at two rates."""
    far, near = window_sum(extent, signal, 9, 2), window_sum(extent, signal, 3, 2)
    both = add(extent, near, add(extent, signal, far))
    down = window_sum(extent, both, 5, 1, stride=2, extra=1)
    other = window_sum(extent, signal, 2, 0, stride=2, extra=1)
    return add(extent, down, other)


def test_branches_of_different_delays_add_up():
    rate = 4
    values = make_values(rate * max(LENGTHS), len(LENGTHS))
    together, out = whole(branches, values, rate, LENGTHS)
    assert (out.rate, out.extra) == (2, 1)
    chunked = Chunked(branches, rate, block=3)
    streams = [chunked(values, LENGTHS, seed) for seed in range(6)]
    for row, length in enumerate(LENGTHS):
        want = alone(branches, values[row, : rate * length], rate)
        np.testing.assert_allclose(together[row], want, rtol=0, atol=1e-5)
        for made in streams:
            np.testing.assert_allclose(made[row], want, rtol=0, atol=1e-5)


def test_order_does_not_matter_to_a_sum():
    late, early = Signal(jnp.full((1, 3, 1), 2.0), 1, delay=2), Signal(jnp.full((1, 3, 1), 1.0), 1)
    for pair in ((late, early), (early, late)):
        total = add(Chunk(None, counts(0), counts(3), counts(3)), *pair)
        assert total.delay == 2
        np.testing.assert_array_equal(total.values[0, :, 0], [2, 2, 3])


def test_endless_places_fit_into_32_bits():
    """At 24 kHz: 22 hours of frames of 480 samples."""
    assert ENDLESS * 480 < 2**31
    assert ENDLESS / 50 > 22 * 3600


def test_upsampled_blocks_are_cut_alike():
    blocks = jnp.arange(16.0).reshape(1, 4, 4)  # of stride 4 and one channel: an element each of 3, and one behind
    signal = Signal(jnp.zeros((1, 3, 1)), 2)
    got = Whole().upsampled(blocks, signal, 4, 2)
    assert got.rate == 8
    np.testing.assert_array_equal(got.values[0, :, 0], np.arange(2, 14))
    late = Chunk(None, counts(0), counts(1), counts(2)).upsampled(blocks, Signal(signal.values, 2, delay=1), 4, 2)
    assert (late.rate, late.delay) == (8, 6)
    np.testing.assert_array_equal(late.values[0, :, 0], np.arange(16))
