"""Layers against plain numpy, and their logical axes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.layers import Embedding, FeedForward, GatedFeedForward, LayerNorm, Linear, RmsNorm, contract, gelu
from cv2jax.parallel.sharding import RULES


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def numpy_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def randomize(params, seed=9):
    """Replaces zeros and ones of fresh parameters, so that every parameter matters."""
    leaves, tree = jax.tree.flatten(nn.unbox(params))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for leaf in leaves])


def test_rms_norm_has_a_scale_alone_and_computes_in_float32():
    x = draw(2, 5, 8)
    params = randomize(RmsNorm().init(jax.random.key(0), x))
    want = x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-6) * params["params"]["scale"]
    np.testing.assert_allclose(RmsNorm().apply(params, x), want, atol=1e-5)
    assert set(params["params"]) == {"scale"}
    # Squares of 300 overflow nothing and round little, in bf16 too: they are taken in fp32.
    large = RmsNorm().apply(params, (300 * x).astype(jnp.bfloat16))
    assert large.dtype == jnp.bfloat16
    np.testing.assert_allclose(large.astype(jnp.float32), want, atol=0.03)


def test_gated_feed_forward_is_swiglu_without_biases():
    x = draw(2, 5, 8)
    layer = GatedFeedForward(8, 12)
    params = randomize(layer.init(jax.random.key(0), x))
    kernels = {name: np.asarray(p["kernel"]) for name, p in params["params"].items()}
    assert sorted(params["params"]) == ["down", "gate", "up"]
    assert all(set(p) == {"kernel"} for p in params["params"].values())
    gate = x @ kernels["gate"]
    want = (gate / (1 + np.exp(-gate)) * (x @ kernels["up"])) @ kernels["down"]
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


def test_linear_contracts_the_last_axes():
    x = draw(2, 5, 3, 4)
    layer = Linear((3, 4, 6), ("heads", "head_dim", "embed"), num_input_axes=2)
    params = randomize(layer.init(jax.random.key(0), x))
    want = x.reshape(2, 5, 12) @ params["params"]["kernel"].reshape(12, 6) + params["params"]["bias"]
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


@pytest.mark.parametrize("shapes", [((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 6), 2), ((7,), (7, 2), 1)])
def test_gradients_of_a_contraction_are_jax_s_own(shapes):
    x_shape, kernel_shape, num_axes = shapes
    x, kernel = draw(*x_shape), draw(*kernel_shape, seed=1)
    loss = lambda product, x, kernel: jnp.sum(jnp.sin(product(x, kernel, num_axes)))  # noqa: E731
    got = jax.grad(loss, (1, 2))(contract, x, kernel)
    want = jax.grad(loss, (1, 2))(jnp.tensordot, x, kernel)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rematerialisation_still_sees_the_products_of_a_contraction():
    """The policy "dots" keeps what a plain product keeps: no product is computed twice."""

    def count(product):
        body = jax.checkpoint(
            lambda x, kernel: jnp.sin(product(x, kernel, 1)),
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        )
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, kernel: jnp.sum(body(x, kernel)), (0, 1)))(draw(2, 8), draw(8, 8))
        return str(jaxpr).count("dot_general[")

    assert count(contract) == count(jnp.tensordot) == 3


def test_linear_makes_heads_at_their_true_shape():
    x = draw(2, 5, 8)
    layer = Linear((8, 2, 4), ("embed", "heads", "head_dim"))
    boxed = layer.init(jax.random.key(0), x)["params"]
    assert boxed["kernel"].names == ("embed", "heads", "head_dim")
    assert boxed["bias"].names == ("heads", "head_dim")
    params = randomize({"params": boxed})
    want = np.einsum("bld,dhc->blhc", x, params["params"]["kernel"]) + params["params"]["bias"]
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


def test_linear_without_bias_has_only_a_kernel():
    params = Linear((8, 3), ("embed", None), use_bias=False).init(jax.random.key(0), draw(1, 8))
    assert set(params["params"]) == {"kernel"}


def test_linear_initial_variance_is_one_over_all_inputs():
    kernel = nn.unbox(Linear((16, 32, 64), ("heads", "head_dim", "embed"), 2).init(jax.random.key(0), draw(1, 16, 32)))
    assert np.std(kernel["params"]["kernel"]) == pytest.approx(1 / math.sqrt(16 * 32), rel=0.05)


def test_residual_bias_is_replicated():
    boxed = Linear((8, 4), ("mlp", "embed")).init(jax.random.key(0), draw(1, 8))["params"]
    assert boxed["bias"].names == ("norm",)


def test_bfloat16_compute_keeps_parameters_in_float32():
    layer = Linear((8, 4), ("embed", "mlp"), dtype="bfloat16")
    params = layer.init(jax.random.key(0), draw(1, 8))
    assert layer.apply(params, draw(1, 8)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_layer_norm_is_torchs_with_eps_1e_5():
    x = draw(2, 3, 7) * 1e-2 + 100.0  # a large mean: E[x²]-E[x]² would lose every digit
    params = randomize(LayerNorm().init(jax.random.key(0), x))
    x64 = np.asarray(x, np.float64)
    centred = x64 - x64.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    want = want * params["params"]["scale"] + params["params"]["bias"]
    np.testing.assert_allclose(LayerNorm().apply(params, x), want, atol=2e-3)
    x = draw(2, 3, 7)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    want = want * params["params"]["scale"] + params["params"]["bias"]
    np.testing.assert_allclose(LayerNorm().apply(params, x), want, atol=1e-5)


def test_layer_norm_keeps_the_dtype_of_its_input():
    x = jnp.ones((2, 4), jnp.bfloat16)
    params = LayerNorm().init(jax.random.key(0), x)
    assert LayerNorm().apply(params, x).dtype == jnp.bfloat16
    assert nn.unbox(params)["params"]["scale"].dtype == jnp.float32


def test_gelu_is_the_exact_form():
    x = jnp.linspace(-4, 4, 41)
    np.testing.assert_allclose(gelu(x), numpy_gelu(x), atol=1e-5)
    assert np.abs(np.asarray(jax.nn.gelu(x)) - numpy_gelu(x)).max() > 1e-4  # the tanh form would not pass


def test_feed_forward_equals_numpy():
    x = draw(2, 5, 4)
    layer = FeedForward(4, 8)
    params = randomize(layer.init(jax.random.key(0), x))
    up, down = params["params"]["up"], params["params"]["down"]
    want = numpy_gelu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


def test_embedding_and_tied_logits():
    layer, tokens = Embedding(11, 4), jnp.array([[1, 10, 0]])
    params = randomize(layer.init(jax.random.key(0), tokens))
    table = params["params"]["table"]
    assert table.shape == (11, 4)
    np.testing.assert_allclose(layer.apply(params, tokens), table[tokens] * 2.0, atol=1e-6)
    x = draw(1, 3, 4)
    np.testing.assert_allclose(layer.apply(params, x, method="logits"), x @ table.T, atol=1e-5)


def test_every_layer_names_known_axes():
    x, known = draw(1, 3, 4), {name for name, _ in RULES}
    trees = [
        FeedForward(4, 8).init(jax.random.key(0), x),
        LayerNorm().init(jax.random.key(0), x),
        Embedding(11, 4).init(jax.random.key(0), jnp.array([[1]])),
    ]
    for tree in trees:
        for box in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)):
            assert set(box.names) <= known
