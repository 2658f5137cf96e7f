"""The layers of an ONNX graph by the torch module that they come from, whatever the exporter called their tensors.

The path of a node (`/head/layer1/layer1.0/conv1/Conv`) tells the module (`head.layer1.0.conv1`) and its operator what its
inputs are; the names of the tensors, which are often lost (`onnx::Conv_4423`), tell nothing.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cv2jax.convert.extras import import_official
from cv2jax.convert.onnx_file import OnnxFile, UnknownGraph
from cv2jax.convert.rules import ForeignTensor, Index, Shape, fold_names

# Operator → what its inputs from the second on are; "transposed" is a linear layer's weight as MatMul wants it.
_INPUTS = {
    "Conv": ("weight", "bias"),
    "MatMul": ("transposed",),
    "Gemm": ("transposed", "bias"),
    "LayerNormalization": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}
_VECTORS = {"Mul": "weight", "Add": "bias"}  # of a layer norm in pieces, or of a linear layer
_MAX_ALIASES = 10  # that one name may be of another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A tensor of a module.

    Attributes:
      shape, dtype: as in the state dict. read: a block of it. stored: the initialiser that it is; "": none.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[Index], Shaped[np.ndarray, "..."]]
    stored: str = ""

    @classmethod
    def of(cls, values: Shaped[np.ndarray, "..."]) -> "Parameter":
        """One that is in memory."""
        return cls(shape=values.shape, dtype=values.dtype, read=lambda index: values[index])

    def transpose(self) -> "Parameter":
        """Of a matrix."""
        turned = lambda index: self.read(tuple(index[::-1])).T  # noqa: E731
        return dataclasses.replace(self, shape=self.shape[::-1], read=turned)


class OnnxModules:
    """Modules of a graph.

    Attributes:
      place: of the file, for messages. nodes: of each module, in their order; under "" those of none.
      parameters: by `module.name`; several where more than one operator of a module has such an input.
      notes: what our own writer has left in the metadata.
    """

    def __init__(self, file: OnnxFile, roots: str) -> None:
        """`roots`: a regular expression of the first part of a module's path; what stands before it is left out."""
        self.place = str(file.path)
        self._file, self._roots = file, re.compile(roots)
        self._forgotten: set[str] = set()
        self._producers = {output: node for node in file.model.graph.node for output in node.output}
        self.nodes: dict[str, list[Any]] = collections.defaultdict(list)
        self.parameters: dict[str, list[Parameter]] = collections.defaultdict(list)
        self.notes = {
            p.key.removeprefix("cv2jax."): p.value for p in file.model.metadata_props if p.key.startswith("cv2jax.")
        }
        for node in file.model.graph.node:
            module = self._module(node)
            self.nodes[module].append(node)
            if module:
                self._add_parameters(module, node)

    def _module(self, node: Any) -> str:
        """`head.layer1.0.conv1` of `/head/layer1/layer1.0/conv1/Conv`; "" of a node outside the roots."""
        parts: list[str] = []
        path = node.name or re.sub(r"_output_\d+$", "", node.output[0])
        for part in path.strip("/").split("/")[:-1]:
            if parts and part.startswith(f"{parts[-1]}."):
                parts.pop()  # a list's path repeats its name
            parts.append(part)
        starts = [i for i, part in enumerate(parts) if self._roots.fullmatch(part)]
        return ".".join(parts[starts[0] :]) if starts else ""

    def _add_parameters(self, module: str, node: Any) -> None:
        for name, edge in zip(_INPUTS.get(node.op_type, ()), node.input[1:], strict=False):
            found = self.constant(edge)
            if found and name != "transposed":
                self._add(f"{module}.{name}", found)
            elif found and len(found.shape) == 2:
                is_turned = node.op_type == "Gemm" and self.attribute(node, "transB", 0)
                self._add(f"{module}.weight", found if is_turned else found.transpose())
        if node.op_type in _VECTORS:
            for found in filter(None, map(self.constant, node.input)):
                if len(found.shape) == 1 and found.shape[0] > 1:
                    self._add(f"{module}.{_VECTORS[node.op_type]}", found)

    def _add(self, name: str, parameter: Parameter) -> None:
        if not any(known.stored and known.stored == parameter.stored for known in self.parameters[name]):
            self.parameters[name].append(parameter)

    def constant(self, edge: str) -> Parameter | None:
        """What an edge always holds: an initialiser, a constant, another name of one, a transposed one; None: neither."""
        is_turned = False
        for _ in range(_MAX_ALIASES):
            if edge in self._file.tensors:
                stored = self._file.tensors[edge]
                found = Parameter(shape=stored.shape, dtype=stored.dtype, read=stored.read, stored=edge)
                return found.transpose() if is_turned else found
            node = self._producers.get(edge)
            if node is None:
                return None
            if node.op_type == "Constant":
                values = self._constant_value(node)
                return None if values is None else Parameter.of(values.T if is_turned else values)
            if node.op_type == "Transpose" and self.attribute(node, "perm", (1, 0)) == (1, 0):
                is_turned = not is_turned
            elif node.op_type != "Identity":
                return None
            edge = node.input[0]
        return None

    def _constant_value(self, node: Any) -> Shaped[np.ndarray, "..."] | None:
        onnx = import_official("onnx")
        for attribute in node.attribute:
            if attribute.name == "value":
                try:
                    return onnx.numpy_helper.to_array(attribute.t)
                except (KeyError, TypeError, ValueError) as error:
                    raise self.unknown(f"the constant {node.output[0]} cannot be read") from error
            if attribute.name in ("value_float", "value_int", "value_floats", "value_ints"):
                return np.asarray(onnx.helper.get_attribute_value(attribute))
        return None

    def attribute(self, node: Any, name: str, default: Any) -> Any:
        """An attribute of a node, lists as tuples."""
        for attribute in node.attribute:
            if attribute.name == name:
                value = import_official("onnx").helper.get_attribute_value(attribute)
                return tuple(value) if isinstance(value, list) else value
        return default

    def find(self, kind: str, inside: str = "") -> list[tuple[str, Any]]:
        """(module, node) of every operator `kind` in the modules whose path matches `inside`; "": in all."""
        matches = [name for name in self.nodes if not inside or re.fullmatch(inside, name)]
        return [(name, node) for name in matches for node in self.nodes[name] if node.op_type == kind]

    def producer(self, edge: str) -> Any:
        """The node that makes an edge; None for inputs and initialisers."""
        return self._producers.get(edge)

    def consumers(self, edge: str) -> list[Any]:
        """The nodes that take an edge."""
        return [node for node in self._file.model.graph.node if edge in node.input]

    def sizes(self, node: Any) -> list[int | None]:
        """What a Reshape reshapes to; None where that is computed."""
        parts: list[int | None] = []
        shape = self.producer(node.input[1])
        whole = self.constant(node.input[1])
        if whole is not None:
            return [int(n) for n in np.atleast_1d(whole.read(()))]
        for edge in shape.input if shape is not None and shape.op_type == "Concat" else ():
            if self.producer(edge) is not None and self.producer(edge).op_type == "Unsqueeze":
                edge = self.producer(edge).input[0]
            known = self.constant(edge)
            parts += [None] if known is None else [int(n) for n in np.atleast_1d(known.read(()))]
        return parts

    def count(self, pattern: str) -> int:
        """How many layers there are, numbered from 0 (or 1, as `pattern` counts) without a gap: `blocks.{}.attn.weight`."""
        first = 0 if self.parameters.get(pattern.format(0)) else 1
        number = first
        while self.parameters.get(pattern.format(number)):
            number += 1
        return number - first

    def shape(self, name: str, rank: int) -> Shape:
        """Of the one parameter `name`; UnknownGraph where there is none, more than one or one of another rank."""
        found = self.parameters.get(name, [])
        if len(found) != 1 or len(found[0].shape) != rank:
            raise self.unknown(f"no {name}" if not found else f"not one {name} of {rank} axes")
        return found[0].shape

    def forget(self, parameter: Parameter) -> None:
        """Says that an initialiser is known and not wanted."""
        self._forgotten.add(parameter.stored)

    def unknown(self, why: str) -> UnknownGraph:
        """The error to raise."""
        return UnknownGraph(f"{self.place}: is not a graph that is known here ({' '.join(why.split())})")

    def reader(self, wanted: Mapping[str, ForeignTensor], find: Callable[[str], Parameter | str]) -> "OnnxReader":
        """A reader of the tensors `wanted`, each the one that `find` gives or names; UnknownGraph where the graph differs.

        That is: one is missing, or of another shape, or the graph has a tensor that is none of them.
        """
        found: dict[str, Parameter] = {}
        for name in wanted:
            given = find(name)
            candidates = self.parameters.get(given, []) if isinstance(given, str) else [given]
            if len(candidates) == 1:
                found[name] = candidates[0]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise self.unknown(f"no {', '.join(fold_names(missing))}")
        for name, parameter in found.items():
            if parameter.shape != wanted[name].shape:
                raise self.unknown(f"{name} is {list(parameter.shape)} and should be {list(wanted[name].shape)}")
        used = {parameter.stored for parameter in found.values()} | self._forgotten
        self._require_nothing_else(used)
        return OnnxReader(self.place, found)

    def _require_nothing_else(self, used: set[str]) -> None:
        rest = [
            name
            for name, stored in self._file.tensors.items()
            if name not in used and stored.dtype.kind == "f" and len(stored.shape) > 0 and max(stored.shape) > 1
        ]
        if rest:
            raise self.unknown(f"tensors of no layer: {', '.join(fold_names(sorted(rest)))}")


class OnnxReader:
    """Tensors of a graph under the names of the state dict, for the rule engine."""

    def __init__(self, place: str, parameters: Mapping[str, Parameter]) -> None:
        self._place, self._parameters = place, parameters

    @property
    def place(self) -> str:
        """The file."""
        return self._place

    def names(self) -> Mapping[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of every tensor, from the file's headers."""
        return {name: (parameter.shape, parameter.dtype) for name, parameter in self._parameters.items()}

    def read(self, name: str, index: Sequence[slice]) -> Shaped[np.ndarray, "..."]:
        """The block `index` of a tensor."""
        return self._parameters[name].read(tuple(index))
