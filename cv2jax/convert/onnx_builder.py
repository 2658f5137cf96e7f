"""Writes down ONNX graphs node by node, named as torch's exporter names them: `/blocks.0/attn/query/MatMul`.

Values are names of edges. Small constants are nodes; only weights are initialisers, as readers of the official files expect.
"""

import collections
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cv2jax.convert.extras import import_official
from cv2jax.convert.onnx_file import write_onnx
from cv2jax.convert.rules import ForeignTensor

IR_VERSION = 8  # what onnxruntime 1.18, which upstream pins, and TensorRT read
Edge = tuple[str, str, Sequence[int | str]]  # name, "float32" or "int32", sizes (a name: any)


class GraphBuilder:
    """A graph that grows.

    Attributes:
      weights: what the weights are called in the state dict. tensors: the initialisers so far.
    """

    def __init__(self, weights: Mapping[str, ForeignTensor]) -> None:
        self.weights = weights
        self.tensors: dict[str, ForeignTensor] = {}
        self._onnx = import_official("onnx")
        self._nodes: list[Any] = []
        self._count: collections.Counter[str] = collections.Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, kind: str, *inputs: str, at: str = "", output: str = "", **attributes: Any) -> str:
        """Adds a node of the operator `kind` in the module `at`, and returns its first output."""
        start = f"/{at}/{kind}" if at else f"/{kind}"
        number = self._count[start]
        self._count[start] += 1
        name = f"{start}_{number}" if number else start
        output = output or f"{name}_output_0"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, values: Any, dtype: str = "float32") -> str:
        """A node that holds `values`, one for all equal ones."""
        array = np.asarray(values, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=self._onnx.numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A vector of int64, for shapes and axes."""
        return self.constant(values, "int64")

    def weight(self, theirs: str, name: str = "", *, is_transposed: bool = False) -> str:
        """The tensor `theirs` of the state dict as the initialiser `name`; transposed as MatMul wants a linear layer's."""
        tensor = self.weights[theirs]
        if is_transposed:
            tensor = ForeignTensor(shape=tensor.shape[::-1], read=functools.partial(_transposed, tensor))
        return self.tensor(name or theirs, tensor)

    def tensor(self, name: str, tensor: ForeignTensor) -> str:
        """An initialiser; ValueError for a name that there is already."""
        if name in self.tensors:
            raise ValueError(f"two tensors {name}")
        self.tensors[name] = tensor
        return name

    def linear(self, x: str, theirs: str, at: str, *, name: str = "", bias: str | None = "") -> str:
        """x · W + b in the module `at`, of the layer `theirs` of the state dict.

        Args:
          name: of the initialiser of W, else one that is like torch's. bias: of b's, else as in the state dict; None: no bias.
        """
        kernel = self.weight(f"{theirs}.weight", name or self.opaque("MatMul"), is_transposed=True)
        y = self.op("MatMul", x, kernel, at=at)
        return y if bias is None else self.op("Add", self.weight(f"{theirs}.bias", bias), y, at=at)

    def conv(self, x: str, kernel: str, bias: str | None = None, *, at: str, **attributes: Any) -> str:
        """A convolution with the initialisers `kernel` and `bias`; its attributes may be left out where they are the usual."""
        size = self.tensors[kernel].shape[2:]
        usual: dict[str, Any] = {
            "strides": (1,) * len(size),
            "dilations": (1,) * len(size),
            "pads": (0, 0) * len(size),
            "group": 1,
        }
        inputs = (x, kernel) if bias is None else (x, kernel, bias)
        return self.op("Conv", *inputs, at=at, kernel_shape=size, **(usual | attributes))

    def layer_norm(self, x: str, theirs: str, at: str, *, names: tuple[str, str] = ("", "")) -> str:
        """The layer norm `theirs` over the last axis, epsilon 1e-5."""
        scale, bias = (
            self.weight(f"{theirs}.{part}", name) for part, name in zip(("weight", "bias"), names, strict=True)
        )
        return self.op("LayerNormalization", x, scale, bias, at=at, axis=-1, epsilon=1e-5)

    def gelu(self, x: str, at: str) -> str:
        """Exact, by the error function."""
        half = self.op("Mul", x, self.constant(0.5), at=at)
        tail = self.op("Erf", self.op("Mul", x, self.constant(math.sqrt(0.5)), at=at), at=at)
        return self.op("Mul", half, self.op("Add", tail, self.constant(1.0), at=at), at=at)

    def size(self, x: str, axis: int, at: str = "") -> str:
        """The size of one axis, an int64 without axes."""
        return self.op("Gather", self.op("Shape", x, at=at), self.constant(axis, "int64"), at=at, axis=0)

    def positions(self, size: str, at: str = "") -> str:
        """0 … size - 1, int64."""
        return self.op("Range", self.constant(0, "int64"), size, self.constant(1, "int64"), at=at)

    def cast(self, x: str, dtype: str, at: str = "", output: str = "") -> str:
        """x in another type."""
        return self.op("Cast", x, at=at, output=output, to=self._type(dtype))

    def slice(self, x: str, start: int, stop: str | int, axis: int, at: str) -> str:
        """x[start:stop] on one axis; a `stop` that is computed is a vector of one int64."""
        end = stop if isinstance(stop, str) else self.ints(stop)
        return self.op("Slice", x, self.ints(start), end, self.ints(axis), at=at)

    def save(
        self, path: str | os.PathLike[str], name: str, inputs: Sequence[Edge], output: Edge, opset: int, **notes: str
    ) -> None:
        """Writes the graph, `notes` as the file's metadata; errors as `write_onnx`."""
        helper = self._onnx.helper
        edges = [
            helper.make_tensor_value_info(edge, self._type(dtype), sizes) for edge, dtype, sizes in (*inputs, output)
        ]
        graph = helper.make_graph(self._nodes, name, edges[:-1], edges[-1:])
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cv2jax")
        helper.set_model_props(model, {f"cv2jax.{key}": value for key, value in notes.items()})
        write_onnx(path, model, self.tensors)

    def _type(self, dtype: str) -> int:
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def opaque(self, kind: str) -> str:
        """A new name such as torch gives the initialisers whose own it has lost."""
        self._count["onnx"] += 1
        return f"onnx::{kind}_{1000 + self._count['onnx']}"


def _transposed(tensor: ForeignTensor) -> Shaped[np.ndarray, "i o"]:
    return tensor.read().T
