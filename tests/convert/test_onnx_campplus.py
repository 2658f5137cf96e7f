"""The graph of CAM++: its contract, its embeddings in onnxruntime against ours, and the way back, batch norms folded."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.campplus import campplus_rules
from cv2jax.convert.onnx_campplus import folded_norms
from cv2jax.convert.onnx_graphs import UnknownGraph, read_campplus_onnx, write_campplus_onnx
from cv2jax.convert.rules import foreign_tensors, load_tree
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import embed
from tests.convert.onnx_runs import all_of, assert_same, assert_unknown, check, edit, node, rename, run, set_attribute
from tests.models.golden_speaker import (
    GOLDEN_CONFIG,
    SMALL_CONFIG,
    GoldenReader,
    abstract_tree,
    golden_arrays,
    golden_tree,
    random_tree,
)

pytestmark = pytest.mark.official
DUMMIES = pathlib.Path(__file__).parents[1] / "goldens" / "official_model_tiny"
ONE = np.float32(np.sqrt(1 + 1e-5))
LENGTHS = (4, 5, 13, 14, 15, 28, 61)  # a segment is 7 of half as many


def our_embeddings(config, tree, features):
    """Of rows [1, F, M] of different lengths, in one call."""
    longest = max(x.shape[1] for x in features)
    padded = np.stack([np.pad(x[0], ((0, longest - x.shape[1]), (0, 0))) for x in features])
    lengths = np.int32([x.shape[1] for x in features])
    return np.asarray(jax.jit(embed, static_argnums=0)(config, tree, tree, padded, lengths))


def features(config, lengths=LENGTHS, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, size, config.num_mels)).astype(np.float32) for size in lengths]


def state_dict(tree):
    """What a state dict of the tree holds."""
    return {name: tensor.read() for name, tensor in foreign_tensors(campplus_rules(), tree, "CAM++").items()}


def host(tree):
    return {part: jax.tree.map(np.asarray, tree[part]) for part in ("encoder", "norms")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, tree) of SMALL_CONFIG."""
    pytest.importorskip("onnx")
    path, tree = tmp_path_factory.mktemp("small") / "campplus.onnx", host(random_tree())
    write_campplus_onnx(path, SMALL_CONFIG, tree)
    return path, tree


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Rule → path of the golden's weights."""
    pytest.importorskip("onnx")
    paths = {rule: tmp_path_factory.mktemp(rule) / "campplus.onnx" for rule in ("count", "kernel")}
    for rule, path in paths.items():
        write_campplus_onnx(path, dataclasses.replace(GOLDEN_CONFIG, partial_segment=rule), golden_tree())
    return paths


def test_the_contract(small):
    model = check(small[0])
    shapes = [
        (
            edge.name,
            edge.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in edge.type.tensor_type.shape.dim],
        )
        for edge in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [("input", 1, ["B", "T", 16]), ("output", 1, ["B", 6])]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]


def test_official_embeddings_under_both_rules(golden):
    arrays = golden_arrays()
    for size in (50, 200, 345):
        for rule, name in (("count", "embedding"), ("kernel", "embedding_kernel")):
            got = run(golden[rule], input=arrays[f"fbank_{size}"])
            np.testing.assert_allclose(got, arrays[f"{name}_{size}"], rtol=0, atol=1e-5)
    differences = [np.abs(arrays[f"embedding_{n}"] - arrays[f"embedding_kernel_{n}"]).max() for n in (50, 345)]
    assert min(differences) > 1e-4  # the rules are told apart


def test_the_layout_is_the_official_one(golden):
    """Counted by others in the official file: 617 initialisers, 56 batch norms left of 122."""
    model = check(golden["count"])
    kinds = [n.op_type for n in model.graph.node]
    assert (len(model.graph.initializer), kinds.count("BatchNormalization")) == (617, 56)
    assert kinds.count("Conv") == 225
    convs = {n.name: n for n in model.graph.node if n.op_type == "Conv"}
    assert len(folded_norms(GOLDEN_CONFIG.block_layers)) == 66
    assert all(
        edge.startswith("onnx::Conv_") for edge in convs["/head/layer1/layer1.0/shortcut/shortcut.0/Conv"].input[1:]
    )
    assert convs["/xvector/block2/tdnnd24/cam_layer/linear1/Conv"].input[1:] == [
        "xvector.block2.tdnnd24.cam_layer.linear1.weight",
        "xvector.block2.tdnnd24.cam_layer.linear1.bias",
    ]
    assert len(convs["/xvector/transit1/linear/Conv"].input) == 2  # the next norm does not follow at once
    assert len(convs["/xvector/transit3/linear/Conv"].input) == 3


@pytest.mark.parametrize("rule", ["count", "kernel"])
def test_other_sizes_and_lengths(small, tmp_path, rule):
    config, tree = dataclasses.replace(SMALL_CONFIG, partial_segment=rule), small[1]
    write_campplus_onnx(tmp_path / "m.onnx", config, tree)
    rows = features(config)
    got = np.concatenate([run(tmp_path / "m.onnx", input=x) for x in rows])
    np.testing.assert_allclose(got, our_embeddings(config, tree, rows), rtol=0, atol=1e-4)
    batch = np.concatenate([rows[-1], rows[-1][:, ::-1]])
    np.testing.assert_allclose(run(tmp_path / "m.onnx", input=batch)[:1], got[-1:], rtol=0, atol=1e-5)


def test_the_way_back_is_exact_but_for_the_folding(small):
    path, tree = small
    config, reader = read_campplus_onnx(path)
    config.validate()
    sizes = dataclasses.asdict(SMALL_CONFIG) | {"crop_seconds": 3.0}
    assert dataclasses.asdict(config) == sizes
    got, want = all_of(reader), state_dict(tree)
    assert set(got) == set(want)
    folded = folded_norms(config.block_layers)
    norms = {norm: conv for conv, norm in folded.items()}
    for name, array in want.items():
        module, _, part = name.rpartition(".")
        if module in norms:
            constant = {"running_mean": 0, "running_var": 1, "weight": ONE}.get(part)
            if part != "bias":
                np.testing.assert_array_equal(got[name], np.full(array.shape, constant, np.float32))
        elif module in folded:
            norm = folded[module]
            gain = want[f"{norm}.weight"] / np.sqrt(want[f"{norm}.running_var"].astype(np.float64) + 1e-5)
            wanted = array * gain.reshape(-1, *(1,) * (array.ndim - 1))
            np.testing.assert_array_equal(got[name], wanted.astype(np.float32))
            shift = want[f"{norm}.bias"] - want[f"{norm}.running_mean"] * gain
            np.testing.assert_array_equal(got[f"{norm}.bias"], shift.astype(np.float32))
        else:
            np.testing.assert_array_equal(got[name], array)


def test_what_is_read_embeds_alike_and_is_written_bit_for_bit(small, tmp_path):
    path, tree = small
    config, reader = read_campplus_onnx(path)
    again = load_tree(campplus_rules(), reader, abstract_tree(config))
    rows = features(config)
    want = our_embeddings(config, tree, rows)
    np.testing.assert_allclose(our_embeddings(config, again, rows), want, rtol=0, atol=1e-5)
    write_campplus_onnx(tmp_path / "again.onnx", config, again)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_the_golden_comes_back(golden):
    config, reader = read_campplus_onnx(golden["kernel"])
    assert config == dataclasses.replace(GOLDEN_CONFIG, partial_segment="kernel")
    theirs = GoldenReader().arrays
    got = all_of(reader)
    assert len(got) == 815  # without the counts of batches
    name = "xvector.block3.tdnnd16.nonlinear1.batchnorm.running_var"
    np.testing.assert_array_equal(got[name], theirs[name])


@pytest.mark.parametrize(("counts_padding", "rule"), [(1, "kernel"), (0, "count")])
def test_the_pooling_of_the_official_file(small, tmp_path, counts_padding, rule):
    """AveragePool with a ceiling and no Pad: what it means in the onnxruntime that upstream pins."""

    def change(model):
        for n in model.graph.node:
            if n.op_type == "AveragePool" and "cam_layer" in n.name:
                pad = next(m for m in model.graph.node if n.input[0] in m.output)
                n.input[0] = pad.input[0]
                set_attribute(n, "ceil_mode", 1)
                set_attribute(n, "count_include_pad", counts_padding)
        for n in [n for n in model.graph.node if n.op_type == "Pad" or n.name == "/xvector/AveragePool"]:
            model.graph.node.remove(n)

    path = edit(small[0], tmp_path / "m.onnx", change)
    assert read_campplus_onnx(path)[0].partial_segment == rule


def test_batch_norms_that_are_not_folded_come_back_whole(small, tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(7)
    theirs = {
        name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ("weight", "bias", "running_mean", "running_var")
    }

    def change(model):
        conv = node(model, "/head/conv1/Conv")
        bias = conv.input.pop()
        model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == bias))
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, f"n.{name}") for name, a in theirs.items())
        output, conv.output[0] = conv.output[0], "raw"
        inputs = ["raw", *(f"n.{name}" for name in theirs)]
        norm = onnx.helper.make_node("BatchNormalization", inputs, [output], name="/head/bn1/BatchNormalization")
        model.graph.node.insert(list(model.graph.node).index(conv) + 1, norm)

    path = edit(small[0], tmp_path / "m.onnx", change)
    check(path)
    got = all_of(read_campplus_onnx(path)[1])
    for name, array in theirs.items():
        np.testing.assert_array_equal(got[f"head.bn1.{name}"], array)
    np.testing.assert_array_equal(got["head.bn2.running_var"], np.ones(4, np.float32))


def test_names_of_tensors_do_not_matter(small, tmp_path):
    path = edit(small[0], tmp_path / "m.onnx", lambda model: rename(model, lambda i, _: f"t{i}"))
    assert_same(all_of(read_campplus_onnx(path)[1]), all_of(read_campplus_onnx(small[0])[1]))


def test_nodes_without_names_are_known_by_their_outputs(small, tmp_path):
    def change(model):
        for n in model.graph.node:
            n.name = ""

    path = edit(small[0], tmp_path / "m.onnx", change)
    with pytest.raises(UnknownGraph):  # the last norm's output is the graph's: "output" tells no module
        read_campplus_onnx(path)
    path = edit(
        path, path, lambda model: setattr(model.graph.node[-1], "name", "/xvector/dense/nonlinear/batchnorm/BN")
    )
    assert_same(all_of(read_campplus_onnx(path)[1]), all_of(read_campplus_onnx(small[0])[1]))


def _mutations():
    def epsilon(model):
        name = "/xvector/block1/tdnnd2/nonlinear1/batchnorm/BatchNormalization"
        set_attribute(node(model, name), "epsilon", 1e-3)

    def stride(model):
        set_attribute(node(model, "/xvector/tdnn/linear/Conv"), "strides", [1])

    def affine(model):
        onnx = pytest.importorskip("onnx")
        two = onnx.numpy_helper.from_array(np.full(6, 2, np.float32), "two")
        model.graph.initializer.append(two)
        node(model, "/xvector/dense/nonlinear/batchnorm/BatchNormalization").input[1] = "two"

    def segments(model):
        set_attribute(node(model, "/xvector/block2/tdnnd1/cam_layer/AveragePool"), "strides", [5])

    def dilations(model):
        conv = node(model, "/xvector/block2/tdnnd2/cam_layer/linear_local/Conv")
        set_attribute(conv, "dilations", [3])

    def gap(model):
        for n in model.graph.node:
            n.name = n.name.replace("block1/tdnnd2", "block1/tdnnd4")

    return {
        "epsilon": (epsilon, "has an epsilon of 0.001"),
        "stride": (stride, r"xvector\.tdnn\.linear has strides \(1,\), not \(2,\)"),
        "affine": (affine, r"xvector\.dense\.nonlinear\.batchnorm has a weight"),
        "segments": (segments, r"segments of \(7,\) every \(5,\)"),
        "dilations": (dilations, "no one dilation of block 2"),
        "gap": (gap, "tensors of no layer|should be"),
    }


@pytest.mark.parametrize("name", list(_mutations()))
def test_a_graph_that_differs_is_unknown(small, tmp_path, name):
    change, why = _mutations()[name]
    path = edit(small[0], tmp_path / "m.onnx", change)
    assert_unknown(read_campplus_onnx, path, why)


@pytest.mark.parametrize("file", ["speech_tokenizer_v2.onnx", "campplus.onnx"])
def test_the_dummies_of_the_tiny_directory_are_unknown(file):
    pytest.importorskip("onnx")
    assert_unknown(read_campplus_onnx, DUMMIES / file, "no dense layers")


def test_what_is_not_finite_is_not_written(small, tmp_path):
    tree = jax.tree.map(np.copy, small[1])
    tree["norms"]["out_norm"]["variance"][3] = np.nan
    with pytest.raises(UserError, match="is not finite, nothing is written"):
        write_campplus_onnx(tmp_path / "m.onnx", SMALL_CONFIG, tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_official_size(tmp_path):
    pytest.importorskip("onnx")
    config = dataclasses.replace(SpeakerEncoderConfig(), partial_segment="kernel")
    tree, path = host(random_tree(SpeakerEncoderConfig())), tmp_path / "campplus.onnx"
    write_campplus_onnx(path, config, tree)
    check(path)
    got_config, reader = read_campplus_onnx(path)
    assert got_config == config
    assert len(reader.names()) == 815
    assert 27_000_000 < path.stat().st_size < 28_303_423  # the official file has more nodes
    rows = features(config, (98, 345))
    want = our_embeddings(config, tree, rows)
    got = np.concatenate([run(path, input=x) for x in rows])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(scale, 1))
