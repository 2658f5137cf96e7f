"""The graph of the velocity network: its contract, and its velocities in onnxruntime against ours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.onnx_graphs import write_estimator_onnx
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import FlowMatching
from cv2jax.nn.masks import MaskSpec, length_mask
from tests.convert.onnx_runs import check, run, values
from tests.models.golden_flow import GOLDEN_CONFIG, GOLDENS, NpzReader, golden_params, load, random_params, small_config

pytestmark = pytest.mark.official
NAMES = ["x", "mask", "mu", "t", "spks", "cond"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("golden") / "estimator.onnx"
    write_estimator_onnx(path, GOLDEN_CONFIG, golden_params())
    return path


def inputs(config, size, lengths, seed=0):
    """Random inputs of two rows, of which so many frames are valid."""
    rng = np.random.default_rng(seed)
    mel = lambda: rng.standard_normal((2, config.num_mels, size)).astype(np.float32)  # noqa: E731
    mask = (np.arange(size) < np.asarray(lengths)[:, None])[:, None].astype(np.float32)
    spks = rng.standard_normal((2, config.num_mels)).astype(np.float32)
    return {"x": mel(), "mask": mask, "mu": mel(), "t": np.float32([0.31, 0.97]), "spks": spks, "cond": mel()}


def our_velocity(config, params, given):
    """[2, M, S], 0 where the mask is."""
    lengths = jnp.asarray(given["mask"].sum(axis=(1, 2)), jnp.int32)
    mask = MaskSpec(segments=length_mask(lengths, given["x"].shape[2]).astype(jnp.int32))
    x, mu, cond = (jnp.asarray(given[name].swapaxes(1, 2)) for name in ("x", "mu", "cond"))
    apply = jax.jit(functools.partial(FlowMatching(config).apply, method="velocity"))
    velocity, _, _ = apply({"params": params}, x, given["t"], mu, given["spks"], cond, mask)
    return np.asarray(velocity).swapaxes(1, 2) * given["mask"]


def test_the_contract(golden):
    model = check(golden)
    shapes = {
        edge.name: (
            edge.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in edge.type.tensor_type.shape.dim],
        )
        for edge in (*model.graph.input, *model.graph.output)
    }
    mel = (1, [2, 80, "seq_len"])
    assert [edge.name for edge in model.graph.input] == NAMES  # engines are bound in this order
    assert shapes == {
        "x": mel,
        "mask": (1, [2, 1, "seq_len"]),
        "mu": mel,
        "t": (1, [2]),
        "spks": (1, [2, 80]),
        "cond": mel,
        "estimator_out": mel,
    }
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]


def test_the_official_velocity_with_a_padded_row(golden):
    given = {name: np.asarray(array) for name, array in load("estimator_tiny").items()}
    got = run(golden, **{name: given[name] for name in NAMES})
    assert given["mask"].sum() < given["mask"].size
    np.testing.assert_allclose(got, given["out_full"], rtol=0, atol=1e-4)
    assert not np.any(got[:, :, :] * (1 - given["mask"]))


def test_the_tensors_are_those_of_the_state_dict(golden):
    model = check(golden)
    theirs = NpzReader(GOLDENS / "flow_tiny_weights.npz")
    estimator = {
        name.removeprefix("decoder.estimator."): theirs.read(name, (slice(None),) * len(shape))
        for name, (shape, _) in theirs.names().items()
        if name.startswith("decoder.estimator.")
    }
    initializers = {tensor.name for tensor in model.graph.initializer}
    assert len(initializers) == len(estimator)
    named = {name for name in estimator if name in initializers}
    for name in named:
        np.testing.assert_array_equal(values(model, name), estimator[name])
    # The rest are the weights of linear layers, found by their nodes.
    linear = {n.name: n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in initializers}
    assert len(linear) == len(estimator) - len(named)
    for path, edge in linear.items():
        name = path[1:].removesuffix("/MatMul").replace("/", ".")
        np.testing.assert_array_equal(values(model, edge).T, estimator[f"{name}.weight"])


def test_other_sizes_and_lengths(tmp_path):
    config = small_config()
    params = random_params(config)
    write_estimator_onnx(tmp_path / "m.onnx", config, params)
    check(tmp_path / "m.onnx")
    longest = inputs(config, 37, (37, 20))
    want = our_velocity(config, params, longest)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", **longest), want, rtol=0, atol=1e-4)
    for size in (20, 1):  # the longest of a batch decides the size; a row is the same in each
        cut = {name: array[..., :size] if array.ndim == 3 else array for name, array in longest.items()}
        got = run(tmp_path / "m.onnx", **cut)
        assert got.shape == (2, 8, size)
        if size == 20:
            np.testing.assert_allclose(got[1], want[1, :, :20], rtol=0, atol=1e-4)
        assert np.isfinite(got).all()


def test_unrolled_parameters_and_garbage_behind_the_mask(golden, tmp_path):
    unrolled = dataclasses.replace(GOLDEN_CONFIG, scan_layers=False)
    write_estimator_onnx(tmp_path / "m.onnx", unrolled, {"estimator": golden_params(unrolled)["estimator"]})
    assert (tmp_path / "m.onnx").read_bytes() == golden.read_bytes()
    given = inputs(GOLDEN_CONFIG, 12, (12, 7))
    clean = run(golden, **given)
    given["x"][1, :, 7:], given["cond"][1, :, 7:] = 1e3, -1e3
    np.testing.assert_allclose(run(golden, **given), clean, rtol=0, atol=1e-5)


def test_what_is_not_finite_is_not_written(tmp_path):
    pytest.importorskip("onnx")
    config = small_config()
    params = jax.tree.map(np.array, random_params(config))
    params["estimator"]["velocity"]["bias"][0] = np.inf
    with pytest.raises(UserError, match=r"final_proj\.bias is not finite, nothing is written"):
        write_estimator_onnx(tmp_path / "m.onnx", config, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_official_size(tmp_path):
    pytest.importorskip("onnx")
    config = FlowMatchingConfig()
    params = {"estimator": random_params(config, seed=2)["estimator"]}
    path = tmp_path / "flow.decoder.estimator.fp32.onnx"
    write_estimator_onnx(path, config, params)
    check(path)
    assert 285_000_000 < path.stat().st_size < 286_317_026  # the official file has more nodes
    given = inputs(config, 131, (131, 90))
    want = our_velocity(config, params, given)
    np.testing.assert_allclose(run(path, **given), want, rtol=0, atol=1e-4 * max(np.abs(want).max(), 1))
