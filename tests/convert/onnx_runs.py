"""What the tests of the ONNX graphs share: a session on the CPU, and graphs that are changed by hand."""

import re

import numpy as np
import pytest

from cv2jax.convert.onnx_graphs import UnknownGraph


def run(path, **inputs):
    """The first output of a graph in onnxruntime."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def check(path):
    """The model, once `onnx.checker` has gone over it with its shapes."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def edit(source, target, change):
    """Writes the model of `source` to `target` once `change(model)` has had its way."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def node(model, name):
    """The node called so."""
    return next(n for n in model.graph.node if n.name == name)


def values(model, name):
    """An initialiser as an array."""
    onnx = pytest.importorskip("onnx")
    return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def set_attribute(found, name, value):
    """Sets an attribute of a node; None removes it."""
    onnx = pytest.importorskip("onnx")
    kept = [a for a in found.attribute if a.name != name]
    del found.attribute[:]
    found.attribute.extend(kept)
    if value is not None:
        found.attribute.append(onnx.helper.make_attribute(name, value))


def rename(model, new_name):
    """Gives every initialiser the name `new_name(number, old)`, wherever it is used."""
    names = {tensor.name: new_name(i, tensor.name) for i, tensor in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for found in model.graph.node:
        found.input[:] = [names.get(edge, edge) for edge in found.input]


def all_of(reader):
    """Every tensor of a reader."""
    return {name: reader.read(name, (slice(None),) * len(shape)) for name, (shape, _) in reader.names().items()}


def assert_same(got, want):
    """The same names, and every bit."""
    assert set(got) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def assert_unknown(read, path, why):
    """`read` says of the file, in one line, that its graph is not known, and why: a pattern."""
    pattern = rf"{re.escape(path.name)}: is not a graph that is known here \(.*({why})"
    with pytest.raises(UnknownGraph, match=pattern) as error:
        read(path)
    assert "\n" not in str(error.value)
