"""ONNX files: tensors are read from where they lie, a bad file is one line, and nothing half is written."""

import tracemalloc

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.onnx_file import OnnxFile, UnknownGraph, write_onnx
from cv2jax.convert.rules import ForeignTensor

pytestmark = pytest.mark.official


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "matrix": rng.standard_normal((5, 300)).astype(np.float32),
        "vector": rng.standard_normal(7).astype(np.float32),
        "number": np.float32(rng.standard_normal()),
        "none": np.zeros((0, 3), np.float32),
    }


def model(onnx, tensors=()):
    """y = x + vector."""
    info = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [7])  # noqa: E731
    node = onnx.helper.make_node("Add", ["x", "vector"], ["y"], name="/last/Add")
    graph = onnx.helper.make_graph([node], "g", [info("x")], [info("y")], list(tensors))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def foreign(values):
    return {name: ForeignTensor(shape=a.shape, read=lambda a=a: a) for name, a in values.items()}


def whole(array):
    return (slice(None),) * np.ndim(array)


@pytest.fixture
def written(onnx, tmp_path):
    path = tmp_path / "m.onnx"
    write_onnx(path, model(onnx), foreign(arrays()))
    return path


def test_what_is_written_is_onnx(onnx, written):
    loaded = onnx.load(written)
    onnx.checker.check_model(loaded)
    assert [t.name for t in loaded.graph.initializer] == list(arrays())
    for tensor, want in zip(loaded.graph.initializer, arrays().values(), strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), want)
    assert loaded.graph.node[0].name == "/last/Add"
    assert [p.name for p in written.parent.iterdir()] == ["m.onnx"]


def test_what_is_written_is_read(written):
    file = OnnxFile(written)
    assert {name: (t.shape, t.dtype) for name, t in file.tensors.items()} == {
        name: (a.shape, np.dtype("f4")) for name, a in arrays().items()
    }
    for name, want in arrays().items():
        np.testing.assert_array_equal(file.tensors[name].read(whole(want)), want)
    block = (slice(1, 4), slice(10, 290))
    np.testing.assert_array_equal(file.tensors["matrix"].read(block), arrays()["matrix"][block])
    assert not file.model.graph.initializer
    assert [n.op_type for n in file.model.graph.node] == ["Add"]


@pytest.mark.parametrize("kind", ["raw", "typed", "external"])
def test_all_ways_to_store_a_tensor(onnx, tmp_path, kind):
    values = arrays() | {"half": np.float16([1.5, -2]), "ints": np.int64([3, 1 << 40]), "wide": np.float64([0.1])}
    if kind == "typed":
        tensor_type = onnx.helper.np_dtype_to_tensor_dtype
        tensors = [onnx.helper.make_tensor(n, tensor_type(a.dtype), a.shape, a.ravel()) for n, a in values.items()]
    else:
        tensors = [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in values.items()]
    options = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0} if kind == "external" else {}
    onnx.save(model(onnx, tensors), tmp_path / "m.onnx", **options)
    file = OnnxFile(tmp_path / "m.onnx")
    assert set(file.tensors) == set(values)
    for name, want in values.items():
        got = file.tensors[name].read(whole(want))
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_a_file_that_is_cut_anywhere_is_damaged(written, tmp_path):
    data = written.read_bytes()
    for size in [1, 2, 10, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "cut.onnx").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.onnx: is damaged .*; copy it again$") as error:
            OnnxFile(tmp_path / "cut.onnx")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (b"PK\x03\x04 not a graph at all", "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is only git's pointer to the file"),
    ],
)
def test_what_is_no_onnx(tmp_path, onnx, data, message):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UserError, match=rf"m\.onnx: {message}"):
        OnnxFile(tmp_path / "m.onnx")


def test_a_missing_file_and_a_directory(tmp_path, onnx):
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            OnnxFile(path)


@pytest.mark.parametrize("name", [b"vector", b"/last/Add"])
def test_a_name_that_is_no_text(written, name):
    written.write_bytes(written.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(UserError, match=r"is damaged \(a name is no text\)"):
        OnnxFile(written)


def test_a_tensor_of_another_size_than_it_says(onnx, tmp_path):
    tensor = onnx.numpy_helper.from_array(arrays()["vector"], "vector")
    tensor.raw_data = tensor.raw_data[:-4]
    onnx.save(model(onnx, [tensor]), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"tensor vector has 24 bytes of 28"):
        OnnxFile(tmp_path / "m.onnx")


def test_external_data_must_lie_beside_the_file_and_be_whole(onnx, tmp_path):
    tensor = onnx.numpy_helper.from_array(arrays()["matrix"], "matrix")
    place = tmp_path / "in"
    place.mkdir()
    onnx.save(model(onnx, [tensor]), place / "m.onnx", save_as_external_data=True, location="d", size_threshold=0)
    data = (place / "d").read_bytes()
    (place / "d").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"d: is damaged \(cut off before the end of tensor matrix\)"):
        OnnxFile(place / "m.onnx")
    (place / "d").unlink()
    with pytest.raises(UserError, match=r"d: is missing, and m\.onnx keeps tensors in it"):
        OnnxFile(place / "m.onnx")
    (tmp_path / "outside").write_bytes(data)
    for location in ("../outside", str(tmp_path / "outside")):
        loaded = onnx.load(place / "m.onnx", load_external_data=False)
        next(e for e in loaded.graph.initializer[0].external_data if e.key == "location").value = location
        (place / "bad.onnx").write_bytes(loaded.SerializeToString())
        with pytest.raises(UserError, match="outside its directory"):
            OnnxFile(place / "bad.onnx")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "abc"}, "lies at offset abc, length 24"),
        ({"length": "x"}, "lies at offset 0, length x"),
        ({"offset": "-8"}, "lies at offset -8, length 24"),
        ({"length": "-24"}, "lies at offset 0, length -24"),
        ({"length": "20"}, "has 20 bytes of 24"),
        ({"location": b"\xff"}, "a name is no text"),
    ],
)
def test_external_data_at_no_place(onnx, tmp_path, entries, said):
    tensor = onnx.TensorProto(name="w", dims=[2, 3], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in ({"location": "data"} | entries).items():
        tensor.external_data.add(key=key, value=value if isinstance(value, str) else "?")
    data = model(onnx, [tensor]).SerializeToString()
    if isinstance(entries.get("location"), bytes):
        data = data.replace(b"?", entries["location"])
    (tmp_path / "m.onnx").write_bytes(data)
    (tmp_path / "data").write_bytes(bytes(24))
    with pytest.raises(
        UserError, match=rf"m\.onnx: is damaged \({'' if said.startswith('a name') else 'tensor w '}{said}\)"
    ):
        OnnxFile(tmp_path / "m.onnx")


def test_a_tensor_of_less_than_nothing(onnx, tmp_path):
    tensor = onnx.TensorProto(name="w", dims=[-2, -3], data_type=1, raw_data=bytes(24))
    (tmp_path / "m.onnx").write_bytes(model(onnx, [tensor]).SerializeToString())
    with pytest.raises(UserError, match=r"is damaged \(tensor w has the shape \[-2, -3\]\)"):
        OnnxFile(tmp_path / "m.onnx")


def test_typed_values_of_another_count_than_the_shape(onnx, tmp_path):
    tensor = onnx.TensorProto(name="w", dims=[2, 2], data_type=1, float_data=[1, 2, 3])
    (tmp_path / "m.onnx").write_bytes(model(onnx, [tensor]).SerializeToString())
    with pytest.raises(UserError, match=r"m\.onnx: is damaged \(tensor w: cannot reshape"):
        OnnxFile(tmp_path / "m.onnx").tensors["w"].read((slice(None),) * 2)


def test_a_type_that_is_not_read_is_unknown_and_the_rest_is_still_looked_at(onnx, tmp_path):
    packed = onnx.TensorProto(name="p", dims=[3], data_type=onnx.TensorProto.INT4, raw_data=bytes(2))
    new = onnx.TensorProto(name="n", dims=[3], data_type=99, raw_data=bytes(2))
    for tensor, said in ((packed, "tensor p is of int4"), (new, "tensor n is of the unknown type 99")):
        data = model(onnx, [tensor]).SerializeToString()
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(UnknownGraph, match=said):
            OnnxFile(tmp_path / "m.onnx")
        (tmp_path / "m.onnx").write_bytes(data[:-1])
        with pytest.raises(UserError, match="is damaged"):
            OnnxFile(tmp_path / "m.onnx")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_written(onnx, written, bad):
    before = written.read_bytes()
    values = arrays() | {"vector": np.float32([1, bad] + [0] * 5)}
    with pytest.raises(UserError, match=r"m\.onnx: vector is not finite, nothing is written"):
        write_onnx(written, model(onnx), foreign(values))
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == ["m.onnx"]


def test_more_than_two_gigabytes_are_refused_before_anything_is_read(onnx, tmp_path):
    def never():
        raise AssertionError

    with pytest.raises(UserError, match="more than the 2 GB"):
        write_onnx(tmp_path / "m.onnx", model(onnx), {"a": ForeignTensor(shape=(1 << 15, 1 << 14), read=never)})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(onnx, tmp_path):
    (tmp_path / "none").write_text("a file, where a folder must be")
    with pytest.raises(UserError, match="cannot be written"):
        write_onnx(tmp_path / "none" / "m.onnx", model(onnx), foreign(arrays()))


def test_one_tensor_is_in_memory_at_a_time(onnx, tmp_path):
    size = 1 << 19
    tensors = {f"t{i}": ForeignTensor(shape=(size,), read=lambda i=i: np.full(size, i, np.float32)) for i in range(12)}
    tracemalloc.start()
    write_onnx(tmp_path / "m.onnx", model(onnx), tensors)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 3 * 4 * size
    tracemalloc.reset_peak()
    file = OnnxFile(tmp_path / "m.onnx")
    total = sum(float(file.tensors[f"t{i}"].read((slice(None),))[-1]) for i in range(12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == sum(range(12))
    assert peak < 3 * 4 * size
