"""scan == unrolled, remat == none, split dropout, per-layer state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.layers import Linear
from cv2jax.nn.stack import apply_stack, match_layers, stack_layers, unstack_layers


class Block(nn.Module):
    """x + tanh(linear(x)) + bias, with dropout; counts calls in its state."""

    width: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, state, deterministic, bias):
        y = jnp.tanh(Linear((self.width, self.width), ("embed", None), name="linear")(x)) + bias
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return x + y, None if state is None else state + jnp.sum(y)


class Model(nn.Module):
    """Three blocks, in any of the ways of running them."""

    scan: bool = True
    remat: str = "none"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, state=None, *, deterministic=True):
        fields = {"width": x.shape[-1], "dropout": self.dropout}
        options = {"num_layers": 3, "deterministic": deterministic, "remat": self.remat, "scan": self.scan}
        return apply_stack(Block, fields, x, state, jnp.float32(0.1), **options)


@pytest.fixture(scope="module")
def unrolled():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    return x, nn.unbox(Model(scan=False).init(jax.random.key(0), x))["params"]


def test_scan_equals_unrolled_and_layers_differ(unrolled):
    x, params = unrolled
    stacked = stack_layers(params)
    assert stacked["blocks"]["linear"]["kernel"].shape == (3, 4, 4)
    want, _ = Model(scan=False).apply({"params": params}, x)
    got, _ = Model().apply({"params": stacked}, x)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not np.allclose(params["blocks_0"]["linear"]["kernel"], params["blocks_1"]["linear"]["kernel"])


def test_stack_layers_orders_by_number_and_keeps_the_rest():
    params = {f"blocks_{i}": {"w": jnp.float32(i)} for i in (10, 2, 0)} | {"final_norm": {"scale": jnp.ones(2)}}
    stacked = stack_layers(params)
    np.testing.assert_array_equal(stacked["blocks"]["w"], [0, 2, 10])
    assert set(stacked) == {"blocks", "final_norm"}


def test_scanned_parameters_carry_the_layers_axis(unrolled):
    x, _ = unrolled
    boxed = Model().init(jax.random.key(0), x)["params"]["blocks"]["linear"]
    assert boxed["kernel"].names == ("layers", "embed", None)
    assert not np.allclose(boxed["kernel"].value[0], boxed["kernel"].value[1])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_neither_values_nor_gradients(unrolled, policy, scan):
    x, params = unrolled
    params = stack_layers(params) if scan else params

    def loss(params, remat):
        return jnp.sum(Model(remat=remat, scan=scan).apply({"params": params}, x)[0] ** 2)

    want, got = (jax.value_and_grad(loss)(params, remat) for remat in ("none", policy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), want, got)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_masks_differ_by_layer(unrolled, scan, remat):
    x, params = unrolled
    zeros = jax.tree.map(jnp.zeros_like, stack_layers(params) if scan else params)
    # With zero weights each layer adds 0.1/0.5 where its mask keeps: equal masks would give only 0 or 3 such steps.
    out, _ = Model(scan=scan, remat=remat, dropout=0.5).apply(
        {"params": zeros}, x * 0, deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    steps = np.round(np.asarray(out) / 0.2).astype(int)
    assert {1, 2} & set(steps.reshape(-1).tolist())


@pytest.mark.parametrize("scan", [True, False])
def test_state_goes_through_layer_by_layer(unrolled, scan):
    x, params = unrolled
    params = stack_layers(params) if scan else params
    _, zero = Model(scan=scan).apply({"params": params}, x, jnp.zeros(3))
    _, state = Model(scan=scan).apply({"params": params}, x, jnp.array([10.0, 20.0, 30.0]))
    assert state.shape == (3,)
    np.testing.assert_allclose(state - zero, [10.0, 20.0, 30.0], rtol=1e-5)


def test_unknown_policy(unrolled):
    x, params = unrolled
    with pytest.raises(ValueError, match=r"known: .*dots"):
        Model(remat="some").apply({"params": params}, x)


def test_unstack_layers_is_the_reverse():
    params = {f"blocks_{i}": {"a": jnp.full((2,), i)} for i in range(11)} | {"out": jnp.ones(3)}
    again = unstack_layers(stack_layers(params))
    assert set(again) == set(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_stacks_match_another_tree_in_either_form_and_inside_one_another():
    inner = lambda i: {f"blocks_{j}": {"a": jnp.full((2,), 10 * i + j)} for j in range(11)} | {"out_0": jnp.full(1, i)}  # noqa: E731
    unrolled = {f"stages_{i}": inner(i) for i in range(3)} | {"out": jnp.ones(3)}
    scanned = {"stages": {"blocks": {"a": jnp.zeros(())}, "out_0": jnp.zeros(())}, "out": jnp.zeros(())}
    stacked = match_layers(unrolled, scanned)
    assert jax.tree.structure(stacked) == jax.tree.structure(scanned)
    want = 10 * np.arange(3)[:, None, None] + np.arange(11)[:, None] + np.zeros(2)
    np.testing.assert_array_equal(stacked["stages"]["blocks"]["a"], want)
    again = match_layers(stacked, unrolled)
    assert jax.tree.structure(again) == jax.tree.structure(unrolled)
    jax.tree.map(np.testing.assert_array_equal, again, unrolled)
    with pytest.raises(KeyError, match="other"):
        match_layers(unrolled, {"other": jnp.ones(1)})
