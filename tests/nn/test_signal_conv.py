"""Convolutions of signals: torch's numbers over whole utterances, and each layer alone as a stream of any pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.signal import Chunk, Signal, Whole
from cv2jax.nn.signal_conv import SignalConv, SignalUpsampling
from tests.nn.chunked import Chunked, alone, whole

LENGTHS = [7, 1, 4]
CONVS = {
    "plain": SignalConv((3, 4, 5)),
    "one": SignalConv((1, 4, 5)),
    "even": SignalConv((4, 4, 5)),
    "dilated": SignalConv((5, 4, 5), dilation=3),
    "of another origin": SignalConv((3, 4, 5), origin=-1.5),
    "causal": SignalConv((3, 4, 5), left=2),
    "ahead": SignalConv((3, 4, 5), left=0),
    "strided": SignalConv((6, 4, 5), stride=3, left=1),
    "strided, as the source's": SignalConv((4, 4, 5), stride=2, left=1, extra=1),
}
UPSAMPLINGS = {
    "double": SignalUpsampling((8, 4, 3), 4),
    "ragged": SignalUpsampling((7, 4, 3), 3),
    "wide": SignalUpsampling((11, 4, 3), 5),
    "no overlap": SignalUpsampling((2, 4, 3), 2),
    "one": SignalUpsampling((3, 4, 3), 1),
}
LAYERS = CONVS | UPSAMPLINGS


def make_values(num: int, rows: int = len(LENGTHS), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, num, 4), np.float32)


def params_of(layer):
    rng = np.random.default_rng(1)
    shape, bias = layer.shape, (layer.shape[-1],)
    return {"kernel": rng.standard_normal(shape, np.float32), "bias": rng.standard_normal(bias, np.float32)}


def bound(layer):
    params = jax.tree.map(jnp.asarray, params_of(layer))
    return lambda extent, signal: layer.apply({"params": params}, extent, signal)


def slow_conv(layer: SignalConv, x: np.ndarray, extra: int) -> np.ndarray:
    """The definition, one tap after another, in float64."""
    params, num_out = params_of(layer), len(x) // layer.stride + extra
    left = (layer.shape[0] - 1) // 2 * layer.dilation if layer.left is None else layer.left
    y = np.tile(params["bias"].astype(np.float64), (num_out, 1))
    y -= layer.origin * params["kernel"].sum(axis=(0, 1), dtype=np.float64)
    for i in range(num_out):
        for tap in range(layer.shape[0]):
            at = layer.stride * i - left + layer.dilation * tap
            if 0 <= at < len(x):
                y[i] += x[at].astype(np.float64) @ params["kernel"][tap]
    return y


def slow_upsampling(layer: SignalUpsampling, x: np.ndarray) -> np.ndarray:
    """torch.nn.ConvTranspose1d of padding (size - stride) / 2, in float64."""
    params, cut = params_of(layer), (layer.shape[0] - layer.stride) // 2
    y = np.zeros((layer.stride * (len(x) - 1) + layer.shape[0], layer.shape[2]))
    for i, values in enumerate(x):
        for tap in range(layer.shape[0]):
            y[layer.stride * i + tap] += values.astype(np.float64) @ params["kernel"][tap]
    return y[cut : cut + layer.stride * len(x)] + params["bias"]


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_its_definition(name):
    layer, x = CONVS[name], make_values(24, rows=1)[0]
    got = alone(bound(layer), x, 6)
    np.testing.assert_allclose(got, slow_conv(layer, x, layer.extra or 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", UPSAMPLINGS)
def test_upsampling_is_a_transposed_convolution(name):
    layer, x = UPSAMPLINGS[name], make_values(9, rows=1)[0]
    got = alone(bound(layer), x, 1)
    assert got.shape == (9 * layer.stride, 3)
    np.testing.assert_allclose(got, slow_upsampling(layer, x), rtol=0, atol=1e-5)
    params, cut = params_of(layer), (layer.shape[0] - layer.stride) // 2
    # lax counts the taps from the other end.
    pads = (layer.shape[0] - 1 - cut,) * 2
    lax = jax.lax.conv_transpose(
        x[None], params["kernel"][::-1], (layer.stride,), [pads], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(got, lax[0] + params["bias"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_streams_and_batches_as_it_is_alone(name):
    rate = 6
    apply, values = bound(LAYERS[name]), make_values(rate * max(LENGTHS))
    together, out = whole(apply, values, rate, LENGTHS)
    chunked = Chunked(apply, rate, block=3)
    streams = [chunked(values, LENGTHS, seed) for seed in range(3)]
    assert (chunked.out_rate, chunked.extra) == (out.rate, out.extra)
    for row, length in enumerate(LENGTHS):
        by_itself = alone(apply, values[row, : rate * length], rate)
        assert len(by_itself) == out.rate * length + out.extra
        np.testing.assert_allclose(together[row], by_itself, rtol=0, atol=1e-5)
        for made in streams:
            np.testing.assert_allclose(made[row], by_itself, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_delay_is_what_the_layer_sees_of_the_future(name):
    rate, at = 6, 12  # a NaN at the first element of the third frame
    apply, values = bound(LAYERS[name]), make_values(24, rows=1)
    chunked = Chunked(apply, rate, block=4)
    chunked.start(1, 4)
    values[0, at] = np.nan
    first = int(np.isnan(alone(apply, values[0], rate)).any(axis=1).argmax())
    seen_with_frames = chunked.out_rate * at // rate - chunked.delay  # what was complete before that frame
    assert first >= seen_with_frames
    slack = LAYERS[name].stride if isinstance(LAYERS[name], SignalConv) else 1
    assert first - seen_with_frames < slack


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_outside_the_utterance_is_left(name):
    """The bias is not: the next layer's padding is zero."""
    values = make_values(6 * max(LENGTHS))
    _, out = whole(bound(LAYERS[name]), values, 6, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert not np.any(out.values[row, out.rate * length + out.extra :])
        assert np.all(np.any(out.values[row, : out.rate * length + out.extra], axis=-1))


def test_a_chunk_before_the_start_is_zero():
    layer = SignalConv((5, 4, 5), left=1)  # three elements late
    counts = jnp.full(1, 4, jnp.int32)
    out = bound(layer)(Chunk(None, jnp.zeros(1, jnp.int32), counts, counts), Signal(jnp.asarray(make_values(4, 1)), 1))
    assert out.delay == 3
    assert not np.any(out.values[0, :3])
    assert np.any(out.values[0, 3])


def test_initial_kernels_and_biases():
    signal, key = Signal(jnp.zeros((1, 4, 30)), 1), jax.random.key(0)

    def first(layer):
        return jax.tree.map(
            lambda box: np.asarray(box.value),
            layer.init(key, Whole(), signal)["params"],
            is_leaf=lambda x: hasattr(x, "value"),
        )

    uniform = first(SignalConv((10, 30, 40)))["kernel"]
    limit = 300**-0.5
    assert -limit <= uniform.min() < -0.9 * limit
    assert 0.9 * limit < uniform.max() <= limit
    params = first(SignalConv((10, 30, 40), init_scale=0.01))
    assert 0.0097 < params["kernel"].std() < 0.0103
    assert not params["bias"].any()
    # One matrix, spread so that the taps of each new element sum to it: a constant in gives a constant out.
    params = first(SignalUpsampling((10, 30, 40), 2))
    kernel = params["kernel"]
    assert 0.95 < kernel[::2].sum(axis=0).std() * 30**0.5 < 1.05
    np.testing.assert_allclose(kernel[::2].sum(axis=0), kernel[1::2].sum(axis=0), atol=1e-6)
    np.testing.assert_allclose(kernel, kernel[::-1], atol=1e-6)
    assert not params["bias"].any()
    np.testing.assert_array_equal(first(SignalUpsampling((10, 30, 40), 2, unit=4.0))["kernel"], 4 * kernel)
    raised = SignalConv((1, 30, 2), bias_init=lambda key, shape, dtype=jnp.float32: jnp.full(shape, 7.0, dtype))
    np.testing.assert_array_equal(first(raised)["bias"], [7, 7])


def test_an_upsampling_in_another_unit_is_the_same():
    signal = Signal(jnp.asarray(make_values(6, 2)), 1)
    plain, scaled = (SignalUpsampling((8, 4, 3), 4, unit=unit) for unit in (1.0, 16.0))
    params = params_of(plain)
    got = scaled.apply({"params": params | {"kernel": 16 * params["kernel"]}}, Whole(), signal).values
    np.testing.assert_array_equal(got, plain.apply({"params": params}, Whole(), signal).values)


def test_a_half_precision_layer_says_half_precision():
    for layer in (SignalConv((3, 4, 5), dtype="bfloat16"), SignalUpsampling((4, 4, 3), 2, dtype="bfloat16")):
        x = make_values(8, 1)[0]
        got = bound(layer)(Whole(), Signal(jnp.asarray(x)[None], 1)).values
        assert got.dtype == jnp.bfloat16
        slow = slow_conv(layer, x, 0) if isinstance(layer, SignalConv) else slow_upsampling(layer, x)
        np.testing.assert_allclose(got[0].astype(np.float32), slow, rtol=0.05, atol=0.1)


def test_an_origin_is_taken_from_the_inputs_and_their_padding():
    x = make_values(9, 1)[0]
    layer = SignalConv((3, 4, 5), origin=-1.5)
    got = bound(layer)(Whole(), Signal(jnp.asarray(x[None]), 1)).values[0]
    padded = np.pad(x, ((1, 1), (0, 0))) + 1.5
    params = params_of(layer)
    want = sum(padded[i : i + 9] @ params["kernel"][i] for i in range(3)) + params["bias"]
    np.testing.assert_allclose(got, want, atol=1e-5)
