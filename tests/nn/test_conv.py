"""Convolutions against plain loops, and the two depth-wise implementations against each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.conv import Conv1d, FsmnMemory, depthwise_conv, strided_length


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loop_conv(x, kernel, stride, padding):
    """Output [B, L, out] of kernel [k, in, out], one frame at a time."""
    x = np.pad(x, ((0, 0), (padding, padding), (0, 0)))
    starts = range(0, x.shape[1] - kernel.shape[0] + 1, stride)
    return np.stack([np.einsum("bki,kio->bo", x[:, s : s + kernel.shape[0]], kernel) for s in starts], axis=1)


def loop_depthwise(x, kernel):
    half = kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (half, half)] + [(0, 0)] * (x.ndim - 2))
    return np.stack([(padded[:, t : t + len(kernel)] * kernel).sum(1) for t in range(x.shape[1])], axis=1)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8])
def test_strided_conv_equals_a_loop(num_frames):
    x = draw(2, num_frames, 3)
    layer = Conv1d((3, 3, 5), ("conv", None, "embed"), stride=2, padding=1)
    params = nn.unbox(layer.init(jax.random.key(0), x))
    params["params"]["bias"] = draw(5, seed=3)
    y = layer.apply(params, x)
    want = loop_conv(x, np.asarray(params["params"]["kernel"]), 2, 1) + params["params"]["bias"]
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert y.shape[1] == strided_length(jnp.array([num_frames]))[0]


def test_strided_length_is_half_rounded_up_and_keeps_zero():
    np.testing.assert_array_equal(strided_length(jnp.arange(7)), [0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(("num_frames", "size"), [(1, 31), (20, 5), (40, 31)])
def test_depthwise_conv_equals_a_loop(num_frames, size):
    x, kernel = draw(2, num_frames, 2, 3), draw(size, 2, 3, seed=1)
    np.testing.assert_allclose(depthwise_conv(x, kernel), loop_depthwise(x, kernel), atol=1e-5)


def grouped_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, None],
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1],
    )


def test_depthwise_gradients_are_those_of_a_grouped_convolution():
    x, kernel = draw(2, 12, 4), draw(5, 4, seed=1)
    ours, theirs = (
        jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) ** 2), (0, 1))(x, kernel) for f in (depthwise_conv, grouped_conv)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_depthwise_sums_in_fp32_whatever_the_dtype():
    x, kernel = draw(1, 50, 3), draw(31, 3, seed=1)
    half = depthwise_conv(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    want = depthwise_conv(x.astype(jnp.bfloat16).astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(half, want.astype(jnp.bfloat16))


def test_depthwise_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="odd kernel"):
        depthwise_conv(draw(1, 4, 2), draw(4, 2))


def test_fsmn_memory_masks_before_and_after():
    v, mask = draw(2, 9, 2, 3), jnp.array([[True] * 9, [True] * 4 + [False] * 5])
    layer = FsmnMemory(2, 3, 5)
    params = layer.init(jax.random.key(0), v, mask)
    kernel = np.asarray(nn.unbox(params)["params"]["kernel"])
    keep = mask[:, :, None, None]
    want = (loop_depthwise(v * keep, kernel) + v * keep) * keep
    np.testing.assert_allclose(layer.apply(params, v, mask), want, atol=1e-5)
    garbage = v.at[1, 4:].set(jnp.nan)
    np.testing.assert_allclose(layer.apply(params, garbage, mask), want, atol=1e-5)
