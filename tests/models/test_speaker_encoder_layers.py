"""The layers of CAM++ against their definitions in numpy: norms and their statistics, contexts, pooling, convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speaker_encoder.layers import (
    BatchNorm,
    TimeConv,
    TimeFrequencyConv,
    keep,
    masked_statistics,
    segment_context,
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lengths(mask_of, size):
    return np.arange(size) < np.asarray(mask_of)[:, None]


def given(*arrays):
    return map(jnp.asarray, arrays)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 2, 4)])
def test_batch_norm_and_its_statistics_are_torchs_over_the_kept_positions(shape):
    x, mask = 2 + 3 * draw(*shape), lengths([5, 2, 0], 5)
    running = {"mean": draw(4, seed=1), "variance": np.exp(draw(4, seed=2))}
    variables = {"params": {"scale": draw(4, seed=3), "bias": draw(4, seed=4)}}
    y, new = BatchNorm().apply(variables, *given(x, mask), running, True)
    kept = x[mask].reshape(-1, 4)
    mean, biased, unbiased = kept.mean(0), kept.var(0), kept.var(0, ddof=1)
    want = (x - mean) / np.sqrt(biased + 1e-5) * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(np.asarray(y)[mask], want[mask], atol=1e-5)
    np.testing.assert_allclose(new["mean"], 0.9 * running["mean"] + 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(new["variance"], 0.9 * running["variance"] + 0.1 * unbiased, rtol=1e-5)
    y, same = BatchNorm().apply(variables, *given(x, mask), running, False)
    want = (x - running["mean"]) / np.sqrt(running["variance"] + 1e-5)
    np.testing.assert_allclose(y, want * variables["params"]["scale"] + variables["params"]["bias"], atol=1e-5)
    assert same is running


@pytest.mark.parametrize("kept", [0, 1])
def test_a_batch_without_two_positions_leaves_the_statistics(kept):
    running = {"mean": draw(4), "variance": np.exp(draw(4))}
    y, new = BatchNorm(affine=False).apply({}, *given(draw(2, 4), np.arange(2) < kept), running, True)
    assert np.isfinite(y).all()
    for name, values in running.items():
        np.testing.assert_array_equal(new[name], values)


def test_without_statistics_they_start_at_mean_0_and_variance_1():
    x = draw(2, 3, 4)
    y, made = BatchNorm(affine=False).apply({}, *given(x, np.ones((2, 3), bool)), None, False)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(made["mean"], np.zeros(4))
    np.testing.assert_array_equal(made["variance"], np.ones(4))


def test_the_norms_gradient_sees_the_batchs_statistics():
    """Of a sum over normalised values nothing is left: the mean takes it all away."""
    x, mask = given(draw(2, 5, 3), lengths([5, 3], 5))
    total = lambda x: jnp.sum(keep(BatchNorm(affine=False).apply({}, x, mask, None, True)[0], mask))  # noqa: E731
    np.testing.assert_allclose(jax.grad(total)(x), np.zeros_like(x), atol=1e-5)


@pytest.mark.parametrize("partial", ["count", "kernel"])
def test_the_context_is_the_rows_mean_plus_that_of_the_segment(partial):
    x, num = draw(4, 11, 3), [11, 8, 3, 0]
    got = segment_context(*given(np.where(lengths(num, 11)[..., None], x, np.nan), lengths(num, 11)), 4, partial)
    assert got.shape == (4, 3, 3)
    for row, count in enumerate(num[:3]):
        for segment in range(-(-count // 4)):
            part = x[row, 4 * segment : min(4 * segment + 4, count)]
            mean = part.mean(0) if partial == "count" else part.sum(0) / 4
            np.testing.assert_allclose(got[row, segment], x[row, :count].mean(0) + mean, atol=1e-6)
    assert np.isfinite(got).all()


def test_pooled_statistics_are_mean_and_unbiased_deviation():
    x, num = draw(3, 9, 4), [9, 2, 6]
    got = masked_statistics(*given(np.where(lengths(num, 9)[..., None], x, np.nan), lengths(num, 9)))
    for row, count in enumerate(num):
        kept = x[row, :count]
        np.testing.assert_allclose(got[row], np.concatenate([kept.mean(0), kept.std(0, ddof=1)]), atol=1e-5)


def test_a_channel_that_never_moves_has_deviation_0_and_a_finite_gradient():
    mask = jnp.ones((1, 5), bool)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(masked_statistics(x, mask)))(jnp.ones((1, 5, 2)))
    assert value == 2
    np.testing.assert_allclose(gradient, np.full((1, 5, 2), 0.2), rtol=1e-6)
    assert np.isfinite(masked_statistics(jnp.ones((1, 5, 2)), ~mask)).all()


@pytest.mark.parametrize(("size", "stride", "dilation"), [(5, 2, 1), (3, 1, 1), (3, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("num_frames", [1, 8, 9])
def test_the_convolution_over_time_is_the_strided_dilated_sum(size, stride, dilation, num_frames):
    x, kernel = draw(2, num_frames, 3), draw(size, 3, 4, seed=1)
    module = TimeConv((size, 3, 4), ("conv", None, None), stride=stride, dilation=dilation)
    got = module.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    reach = dilation * (size // 2)
    padded = np.pad(x, ((0, 0), (reach, reach), (0, 0)))
    want = [sum(padded[:, t + i * dilation] @ kernel[i] for i in range(size)) for t in range(0, num_frames, stride)]
    np.testing.assert_allclose(got, np.stack(want, axis=1), atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_the_convolution_over_time_and_bands_strides_over_bands_alone(size, stride):
    x, kernel, reach = draw(2, 5, 8, 3), draw(size, size, 3, 4, seed=1), size // 2
    got = TimeFrequencyConv((size, 3, 4), stride).apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    want = np.zeros((2, 5, 8 // stride, 4))
    for t in range(5):
        for band in range(0, 8, stride):
            part = padded[:, t : t + size, band : band + size]
            want[:, t, band // stride] = np.einsum("btfi,tfio->bo", part, kernel)
    np.testing.assert_allclose(got, want, atol=1e-5)
