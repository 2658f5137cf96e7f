"""The graph of the speech tokenizer: its contract, its ids in onnxruntime against ours, and the way back."""

import dataclasses
import functools
import pathlib
import re
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.onnx_file import OnnxFile
from cv2jax.convert.onnx_graphs import UnknownGraph, read_speech_tokenizer_onnx, write_speech_tokenizer_onnx
from cv2jax.convert.rules import load_tree
from cv2jax.convert.speech_tokenizer import speech_tokenizer_rules
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig, official, tiny
from cv2jax.models.speech_tokenizer.model import encode
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params
from tests.convert.onnx_runs import (
    all_of,
    assert_same,
    assert_unknown,
    check,
    edit,
    node,
    rename,
    run,
    set_attribute,
    values,
)
from tests.convert.test_speech_tokenizer import GoldenReader
from tests.models.golden_weights import load_golden

pytestmark = pytest.mark.official
DUMMIES = pathlib.Path(__file__).parents[1] / "goldens" / "official_model_tiny"
GOLDEN_CONFIG = dataclasses.replace(tiny(), scan_layers=False)
OTHER_CONFIG = SpeechTokenizerConfig(
    width=48,
    num_heads=3,
    num_layers=3,
    mlp_ratio=2,
    num_mels=20,
    max_freq_bins=4,
    fsmn_kernel=5,
    rope_theta=500.0,
    fsq_dim=5,
)


def abstract(config):
    return nn.unbox(jax.eval_shape(functools.partial(init_encoding_params, config), jax.random.key(0)))


def random_params(config, seed=0):
    """Every parameter matters, and the digits use all their levels."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return noise * np.float32(
                max(leaf.size // leaf.shape[-1] // (leaf.shape[0] if leaf.ndim > 3 else 1), 8) ** -0.5
            )
        return np.float32(path[-1].key == "scale") + np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(draw, abstract(config))


def our_ids(config, params, mel):
    """Speech tokens [B, L] of mels of one length."""
    lengths = jnp.full((mel.shape[0],), mel.shape[2], jnp.int32)
    return np.asarray(jax.jit(encode, static_argnums=0)(config, params, jnp.asarray(mel), lengths)[0])


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(path, mel [4, M, F], lengths [4], official ids [4, L], numbers of ids)."""
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("golden") / "speech_tokenizer_v2.onnx"
    params, arrays = load_golden()
    write_speech_tokenizer_onnx(path, GOLDEN_CONFIG, params)
    return path, arrays["mel"], arrays["mel_len"].astype(np.int32), arrays["tokens"], arrays["token_len"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """(path, params) of OTHER_CONFIG, layers stacked."""
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("other") / "speech_tokenizer_v2.onnx"
    params = random_params(OTHER_CONFIG)
    write_speech_tokenizer_onnx(path, OTHER_CONFIG, params)
    return path, params


def test_the_contract(golden):
    model = check(golden[0])
    shapes = [
        (
            edge.name,
            edge.type.tensor_type.elem_type,
            [d.dim_value or d.dim_param for d in edge.type.tensor_type.shape.dim],
        )
        for edge in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [("feats", 1, ["B", 128, "T"]), ("feats_length", 6, ["B"]), ("indices", 6, ["B", "L"])]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version == 8


def test_official_ids_of_a_padded_batch(golden):
    path, mel, lengths, want, numbers = golden
    got = run(path, feats=mel, feats_length=lengths)
    assert got.dtype == np.int32
    for row, number in enumerate(numbers):
        np.testing.assert_array_equal(got[row, :number], want[row, :number])
        assert not got[row, number:].any()


def test_padding_of_any_content_changes_nothing(golden):
    path, mel, lengths, want, numbers = golden
    for row, (length, number) in enumerate(zip(lengths, numbers, strict=True)):
        alone = mel[row : row + 1, :, :length]
        got = run(path, feats=alone, feats_length=lengths[row : row + 1])
        np.testing.assert_array_equal(got[0], want[row, :number])
        padded = np.concatenate([alone, np.full((1, 128, 13), np.nan, np.float32)], axis=2)
        got = run(path, feats=padded, feats_length=lengths[row : row + 1])
        np.testing.assert_array_equal(got[0, :number], want[row, :number])


def test_other_sizes_and_odd_lengths(other):
    path, params = other
    mel = np.random.default_rng(1).standard_normal((7, 20, 118)).astype(np.float32)
    sizes = np.int32([1, 2, 3, 4, 5, 63, 118])
    want, numbers = map(np.asarray, jax.jit(encode, static_argnums=0)(OTHER_CONFIG, params, mel, sizes))
    np.testing.assert_array_equal(run(path, feats=mel, feats_length=sizes), want)
    for row, size in enumerate(sizes):
        got = run(path, feats=mel[row : row + 1, :, :size], feats_length=sizes[row : row + 1])
        assert got.shape == (1, numbers[row]) == (1, -(-size // 4))
        np.testing.assert_array_equal(got[0], want[row, : numbers[row]])
    assert len(set(want.flat)) > 20  # of 3⁵
    assert want.max() < 3**5


def test_silence(golden):
    path = golden[0]
    params, _ = load_golden()
    mel = np.full((1, 128, 57), -1.5, np.float32)
    got = run(path, feats=mel, feats_length=np.int32([57]))
    np.testing.assert_array_equal(got, our_ids(GOLDEN_CONFIG, params, mel))


def test_the_way_back_is_exact(golden, other):
    config, reader = read_speech_tokenizer_onnx(golden[0])
    assert (config.width, config.num_heads, config.num_layers, config.mlp_ratio) == (128, 2, 2, 4)
    assert (config.num_mels, config.fsmn_kernel, config.fsq_dim, config.quantizer) == (128, 31, 8, "fsq")
    assert_same(all_of(reader), GoldenReader().arrays)
    path, params = other
    config, reader = read_speech_tokenizer_onnx(path)
    sizes = ["width", "num_heads", "num_layers", "mlp_ratio", "num_mels", "fsmn_kernel", "rope_theta", "fsq_dim"]
    assert {n: getattr(config, n) for n in sizes} == {n: getattr(OTHER_CONFIG, n) for n in sizes}
    config.validate()
    loaded = load_tree(speech_tokenizer_rules(), reader, abstract(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(UserError, match="does not fit the model"):
        load_tree(speech_tokenizer_rules(), reader, abstract(dataclasses.replace(config, num_layers=2)))


@pytest.mark.parametrize("num_heads", [1, 8])
def test_heads_of_any_size(tmp_path, num_heads):
    pytest.importorskip("onnx")
    config = dataclasses.replace(OTHER_CONFIG, num_heads=num_heads, num_layers=1)
    write_speech_tokenizer_onnx(tmp_path / "m.onnx", config, random_params(config))
    got, _ = read_speech_tokenizer_onnx(tmp_path / "m.onnx")
    assert (got.num_heads, got.num_layers) == (num_heads, 1)


def test_written_twice_it_is_the_same_file(other, tmp_path):
    path, _ = other
    config, reader = read_speech_tokenizer_onnx(path)
    again = load_tree(speech_tokenizer_rules(), reader, abstract(dataclasses.replace(config, scan_layers=False)))
    write_speech_tokenizer_onnx(tmp_path / "again.onnx", config, again)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_tensors_are_called_as_in_the_official_file(golden):
    """The rules of s3tokenizer's converter, which finds some by their names and the rest by their nodes."""
    model = check(golden[0])
    theirs = GoldenReader().arrays
    for number, name in enumerate(["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"], 2216):
        np.testing.assert_array_equal(values(model, f"onnx::Conv_{number}"), theirs[f"encoder.{name}"])
    projection = "quantizer._codebook.project_down"
    np.testing.assert_array_equal(values(model, "onnx::MatMul_2536").T, theirs[f"{projection}.weight"])
    np.testing.assert_array_equal(values(model, "quantizer.project_in.bias"), theirs[f"{projection}.bias"])
    found = {}
    names = {tensor.name for tensor in model.graph.initializer}
    for n in model.graph.node:
        for edge in names.intersection(n.input):
            path = n.name[1:].replace("/", ".").replace("mlp.mlp", "mlp")
            if n.op_type == "LayerNormalization":
                path = path.replace("LayerNormalization", "weight" if edge == n.input[1] else "bias")
            path = re.sub(r"(MatMul|Conv)$", "weight", re.sub(r"Add$", "bias", path))
            array = values(model, edge)
            found[f"encoder.{path}"] = array.T if n.op_type == "MatMul" else array
    blocks = {name: array for name, array in theirs.items() if ".blocks." in name}
    assert_same({name: array for name, array in found.items() if ".blocks." in name}, blocks)
    assert len(names) == len(theirs)
    assert model.graph.node[-1].output[0] == "indices"


def test_names_of_tensors_do_not_matter(golden, tmp_path):
    path = edit(golden[0], tmp_path / "m.onnx", lambda model: rename(model, lambda i, _: f"t{i}"))
    assert_same(all_of(read_speech_tokenizer_onnx(path)[1]), GoldenReader().arrays)


def test_another_exporter_s_spelling(golden, tmp_path):
    """Transposes that are not folded, aliases, pieces of layer norms, a module in front of the path, sizes left open."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper

    def change(model):
        made = []
        for n in list(model.graph.node):
            n.name = n.name.replace("/blocks.", "/encoder/blocks/blocks.").replace("/conv", "/encoder/conv")
            if n.name.endswith("blocks.1/attn/query/MatMul"):
                tensor = next(t for t in model.graph.initializer if t.name == n.input[1])
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).T.copy(), tensor.name))
                made.append(helper.make_node("Identity", [n.input[1]], ["alias"]))
                made.append(helper.make_node("Transpose", ["alias"], ["turned"], perm=[1, 0]))
                n.input[1] = "turned"
            if n.name.endswith("blocks.0/mlp_ln/LayerNormalization"):
                x, scale, bias = n.input
                start = n.name.removesuffix("LayerNormalization")
                pieces = [helper.make_node("Mul", [x, scale], ["scaled"], name=f"{start}Mul")]
                pieces.append(helper.make_node("Add", ["scaled", bias], list(n.output), name=f"{start}Add"))
                at = list(model.graph.node).index(n)
                model.graph.node.remove(n)
                for piece in reversed(pieces):
                    model.graph.node.insert(at, piece)
            if n.op_type == "Reshape" and "blocks.0/attn" in n.name:
                made.append(helper.make_node("Constant", [], ["open"], value_ints=[-1]))
                made.append(helper.make_node("Constant", [], ["two"], value_ints=[2]))
                made.append(helper.make_node("Shape", ["feats"], ["rows"], end=1))
                made.append(helper.make_node("Concat", ["rows", "open", "two", "open"], ["sizes"], axis=0))
                n.input[1] = "sizes"
        for n in reversed({tuple(n.output): n for n in made}.values()):
            model.graph.node.insert(0, n)

    path = edit(golden[0], tmp_path / "m.onnx", change)
    config, reader = read_speech_tokenizer_onnx(path)
    assert config.num_heads == 2
    assert_same(all_of(reader), GoldenReader().arrays)


def _mutations():
    def epsilon(model):
        set_attribute(node(model, "/blocks.1/attn_ln/LayerNormalization"), "epsilon", 1e-6)

    def pieces(model):
        onnx = pytest.importorskip("onnx")
        norm = node(model, "/blocks.1/mlp_ln/LayerNormalization")
        small = onnx.helper.make_node("Constant", [], ["small"], value_float=1e-6)
        added = onnx.helper.make_node("Add", [norm.input[0], "small"], ["added"], name="/blocks.1/mlp_ln/Add")
        norm.input[0] = "added"
        at = list(model.graph.node).index(norm)
        model.graph.node.insert(at, added)
        model.graph.node.insert(0, small)

    def stride(model):
        set_attribute(node(model, "/conv1/Conv"), "strides", [1])

    def levels(model):
        tanh = node(model, "/quantizer/Tanh")
        scale = next(n for n in model.graph.node if tanh.output[0] in n.input)
        onnx = pytest.importorskip("onnx")
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["bound"], value_float=3.996))
        scale.input[1] = "bound"

    def nameless(model):
        for i, n in enumerate(model.graph.node):
            n.name = f"node_{i}"

    def more(model):
        onnx = pytest.importorskip("onnx")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), "extra"))

    def fewer(model):
        node(model, "/blocks.1/mlp/mlp.2/MatMul").name = "/blocks.1/mlp/mlp.9/MatMul"

    def groups(model):
        set_attribute(node(model, "/blocks.0/attn/fsmn_block/Conv"), "group", 1)

    return {
        "epsilon": (epsilon, "blocks.1.attn_ln has an epsilon of 1e-06, not 1e-05"),
        "pieces": (pieces, "blocks.1.mlp_ln has an epsilon of 1e-06, not 1e-05"),
        "stride": (stride, r"conv1 has strides \(1,\), not \(2,\)"),
        "levels": (levels, "other than three levels"),
        "nameless": (nameless, "no projection of finite scalar quantisation"),
        "more": (more, "tensors of no layer: extra"),
        "fewer": (fewer, r"no encoder\.blocks\.1\.mlp\.2\.weight"),
        "groups": (groups, "fsmn_block has group 1, not 128"),
    }


@pytest.mark.parametrize("name", list(_mutations()))
def test_a_graph_that_differs_is_unknown(golden, tmp_path, name):
    change, why = _mutations()[name]
    path = edit(golden[0], tmp_path / "m.onnx", change)
    assert_unknown(read_speech_tokenizer_onnx, path, why)


@pytest.mark.parametrize("file", ["speech_tokenizer_v2.onnx", "campplus.onnx"])
def test_the_dummies_of_the_tiny_directory_are_unknown(file):
    pytest.importorskip("onnx")
    assert_unknown(read_speech_tokenizer_onnx, DUMMIES / file, "no projection of finite scalar quantisation")


@pytest.mark.full
def test_bytes_that_are_wrong_never_give_more_than_one_line(other, tmp_path):
    data, rng = other[0].read_bytes(), np.random.default_rng(11)
    header = min(tensor.start for tensor in OnnxFile(other[0]).tensors.values())
    outcomes, messages = set(), []
    for _ in range(80):
        wrong = bytearray(data)
        for at in rng.integers(header, size=rng.integers(1, 9)):
            wrong[at] = rng.integers(256)
        (tmp_path / "m.onnx").write_bytes(wrong)
        try:
            read_speech_tokenizer_onnx(tmp_path / "m.onnx")
            outcomes.add("read")
        except UserError as error:
            messages.append(str(error))
            outcomes.add(type(error))
    assert not any("\n" in message for message in messages)
    assert {UserError, UnknownGraph} <= outcomes


def test_another_quantizer_has_no_official_form(tmp_path):
    config = dataclasses.replace(OTHER_CONFIG, quantizer="vq")
    with pytest.raises(UserError, match=r"'vq' has no official form; train with model\.quantizer=fsq"):
        write_speech_tokenizer_onnx(tmp_path / "m.onnx", config, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_official_size(tmp_path):
    pytest.importorskip("onnx")
    config = dataclasses.replace(official(), dtype="float32", remat="none")
    params = random_params(config, seed=3)
    path = tmp_path / "speech_tokenizer_v2.onnx"
    tracemalloc.start()
    write_speech_tokenizer_onnx(path, config, params)
    got_config, reader = read_speech_tokenizer_onnx(path)
    sizes = [reader.read(name, (slice(None),) * len(shape)).nbytes for name, (shape, _) in reader.names().items()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = path.stat().st_size
    assert (got_config.num_heads, got_config.num_layers, len(reader.names())) == (20, 6, 102)
    assert 494_858_272 < size < 496_082_973  # the numbers, and the official file
    assert sum(sizes) == 494_858_272
    assert peak < 4 * max(sizes)  # one tensor at a time, in its layout and in the file's
    rng = np.random.default_rng(4)
    for frames in (501, 96):
        mel = rng.standard_normal((1, 128, frames)).astype(np.float32)
        got = run(path, feats=mel, feats_length=np.int32([frames]))
        np.testing.assert_array_equal(got, our_ids(config, params, mel))
