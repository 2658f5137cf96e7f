"""FLOPs of traced functions against formulas by hand: products, convolutions, loops, kernels, rematerialisation."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from cv2jax.config import MeshConfig
from cv2jax.models.text_speech_lm.loss import packed_loss
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.splash import attend_splash
from cv2jax.parallel.flops import count_flops, count_work, saved_bytes
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import map_local
from cv2jax.parallel.windows import count_taps


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x, w):
    return x @ w


X, W = array(8, 16), array(16, 32)
ONCE = 2 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("function", "args", "flops"),
    [
        (product, (X, W), ONCE),
        (jax.jit(product), (X, W), ONCE),
        (jax.checkpoint(product), (X, W), ONCE),
        (
            lambda x, w: jnp.einsum("bhtc,bhsc->bhts", x, w),
            (array(2, 3, 5, 7), array(2, 3, 11, 7)),
            2 * 2 * 3 * 5 * 11 * 7,
        ),
        (lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], (X, array(16, 16)), 5 * 2 * 8 * 16 * 16),
        (lambda x, w: lax.fori_loop(0, 5, lambda _, c: c @ w, x), (X, array(16, 16)), 5 * 2 * 8 * 16 * 16),
        # A loop whose trips only its data knows: one.
        (
            lambda x, w: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x),
            (X, array(16, 16)),
            2 * 8 * 16 * 16,
        ),
        (lambda x, w: lax.cond(x.sum() > 0, product, lambda x, w: (x @ w) @ w.T @ w, x, w), (X, W), 3 * ONCE),
        (lambda x, w: jax.grad(lambda x, w: product(x, w).sum(), (0, 1))(x, w), (X, W), 2 * ONCE),
        (lambda x, w: jax.value_and_grad(lambda x, w: (product(x, w) ** 2).sum(), (0, 1))(x, w), (X, W), 3 * ONCE),
        (jnp.fft.fft, (array(3, 64, dtype=jnp.complex64),), 3 * 5 * 64 * 6),
        (jnp.fft.rfft, (array(3, 64),), 3 * 2.5 * 64 * 6),
        (jnp.fft.irfft, (array(3, 33, dtype=jnp.complex64),), 3 * 2.5 * 64 * 6),
        (lambda x: x + x, (X,), 0),
    ],
)
def test_known_formulas(function, args, flops):
    assert count_flops(function, *args) == flops


def convolve(x, w, **options):
    return lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **options)


@pytest.mark.parametrize(
    ("options", "inputs", "flops"),
    [
        ({"window_strides": (1,), "padding": "VALID"}, 8, 2 * 2 * (20 - 3 + 1) * 3 * 8 * 16),
        (
            {"window_strides": (1,), "padding": ((2, 0),)},
            8,
            2 * 2 * (20 * 3 - 1 - 2) * 8 * 16,
        ),  # taps on padding are none
        ({"window_strides": (2,), "padding": "VALID"}, 8, 2 * 2 * 9 * 3 * 8 * 16),
        ({"window_strides": (1,), "padding": "VALID", "rhs_dilation": (4,)}, 8, 2 * 2 * 12 * 3 * 8 * 16),
        ({"window_strides": (1,), "padding": "VALID", "feature_group_count": 4}, 2, 2 * 2 * 18 * 3 * 2 * 16),
        # Upsampling by 2: of 37 outputs' taps every other meets a zero.
        ({"window_strides": (1,), "padding": ((0, 0),), "lhs_dilation": (2,)}, 8, 2 * 2 * 56 * 8 * 16),
    ],
)
def test_convolutions(options, inputs, flops):
    assert count_flops(functools.partial(convolve, **options), array(2, 20, 8), array(3, inputs, 16)) == flops


def test_the_gradient_of_a_convolution_costs_twice_its_forward():
    def loss(x, w):
        return (convolve(x, w, window_strides=(2,), padding=((1, 1),), feature_group_count=2) ** 2).sum()

    args = array(2, 21, 8), array(3, 4, 16)
    assert count_flops(jax.value_and_grad(loss, (0, 1)), *args) == 3 * count_flops(loss, *args)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_taps_are_those_of_a_loop(size):
    options = itertools.product((1, 2, 5, 9), (1, 3, 8), (1, 2, 3, 4), (-2, 0, 1, 5), (1, 2, 3, 6), (1, 2))
    for outputs, kernel, stride, low, dilation, kernel_dilation in options:
        places = [o * stride + k * kernel_dilation - low for o in range(outputs) for k in range(kernel)]
        wanted = sum(0 <= p <= (size - 1) * dilation and p % dilation == 0 for p in places)
        assert count_taps(size, outputs, kernel, stride, low, dilation, kernel_dilation) == wanted


def test_rematerialisation_is_told_apart():
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(run, x, w):
        return lax.scan(lambda c, _: (run(c, w), None), x, length=4)[0].sum()

    x, w = array(8, 16), array(16, 16)
    one = 2 * 8 * 16 * 16
    works = [
        count_work(jax.make_jaxpr(jax.value_and_grad(functools.partial(loss, run), (0, 1)))(x, w))
        for run in (layer, jax.checkpoint(layer), jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable))
    ]
    assert [work.model_flops for work in works] == [4 * 6 * one] * 3
    assert works[0].recomputed == 0
    assert works[1].recomputed == 4 * 2 * one
    assert works[2].recomputed == 0


def test_parts_on_devices_are_counted_where_they_differ():
    mesh = make_mesh(MeshConfig(fsdp=4))  # data 2
    with jax.set_mesh(mesh):
        rows = ("batch", None)
        split = lambda x, w: map_local(product, [x, w], [rows, (None, None)], rows)  # noqa: E731
        assert count_flops(split, X, W) == ONCE
        whole = lambda x, w: jax.shard_map(product, in_specs=(P(), P()), out_specs=P(), check_vma=False)(x, w)  # noqa: E731
        assert count_flops(whole, X, W) == ONCE


def test_a_kernel_counts_for_each_step_of_its_grid():
    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def run(x, w):
        rows, whole = pl.BlockSpec((2, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))
        specs = {"in_specs": [rows, whole], "out_specs": pl.BlockSpec((2, 32), lambda i: (i, 0))}
        return pl.pallas_call(kernel, grid=(4,), out_shape=array(8, 32), name="mine", interpret=True, **specs)(x, w)

    assert count_flops(run, X, W) == ONCE
    assert count_work(jax.make_jaxpr(run)(X, W)).kernels == {"mine": (1, ONCE)}


@pytest.mark.parametrize(("mask", "blocks"), [("full", 4), ("causal", 3)])
def test_splash_attention_counts_the_blocks_that_its_mask_leaves(mask, blocks):
    """Two products forward, seven backward (three for dq, four for dk and dv), of 2 × 2 blocks of 512."""

    def loss(q, k, v):
        return attend_splash(q, k, v, MaskSpec(kind=mask)).sum()

    x = array(2, 1024, 3, 64)
    one = 2 * 2 * 3 * 512 * 512 * 64
    assert count_flops(loss, x, x, x) == 2 * blocks * one
    small = 2 * 2 * 3 * 1024 * 64  # each row's product of output and its gradient
    assert count_flops(jax.grad(loss, (0, 1, 2)), x, x, x) == 9 * blocks * one + small


def lm(**changes):
    sizes = {"vocabulary_size": 512, "width": 64, "mlp_dim": 160, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    return TextSpeechLmConfig(backbone=Qwen2Config(**sizes, remat=changes.pop("remat", "none")), **changes)


@pytest.mark.parametrize(("remat", "loss_chunk"), [("none", 0), ("full", 0), ("dots", 64), ("full", 64)])
def test_the_language_model_costs_six_a_parameter_and_token(remat, loss_chunk):
    config = lm(remat=remat, loss_chunk=loss_chunk)
    rows, length = 2, 256
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    import flax.linen as nn

    params = nn.unbox(params)
    batch = {
        name: array(rows, length, dtype=jnp.int32) for name in ("token", "kind", "targets", "positions", "segments")
    }
    step = lambda params, batch: jax.value_and_grad(lambda p: packed_loss(config, p, batch)[0])(params)  # noqa: E731
    counted = count_flops(step, params, batch)
    b = config.backbone
    matrices = b.num_layers * (b.width * b.head_dim * (2 * b.num_heads + 2 * b.num_kv_heads) + 3 * b.width * b.mlp_dim)
    matrices += math.prod(params["head_kernel"].shape)
    tokens = rows * length
    # Attention: logits and sums of all blocks that the causal path computes, at most all of them.
    attention = 3 * b.num_layers * 4 * rows * b.width * length**2
    assert 6 * matrices * tokens < counted <= 6 * matrices * tokens + attention


def test_what_is_kept_for_the_backward_pass():
    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    kept = saved_bytes(jax.make_jaxpr(jax.jit(jax.value_and_grad(loss)))(X, W))
    assert kept == 8 * 32 * 4  # the cosine; the inputs are there anyhow
    assert saved_bytes(jax.make_jaxpr(loss)(X, W)) == 0

    def deep(run):
        return jax.make_jaxpr(jax.grad(lambda x, w: lax.scan(lambda c, _: (run(c, w), None), x, length=6)[0].sum()))

    layer = lambda c, w: jnp.sin(jnp.sin(c @ w) @ w)  # noqa: E731
    plain, remat = (saved_bytes(deep(run)(X, array(16, 16))) for run in (layer, jax.checkpoint(layer)))
    assert remat == 6 * 8 * 16 * 4 < plain
