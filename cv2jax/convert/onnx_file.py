"""ONNX files with their tensors left in the file: read one at a time, written one at a time, never run.

A file is one protobuf message whose bulk is the payloads of its initialisers. The reader walks the fields of the message,
notes where each payload lies and hands the rest to `onnx`; the writer does the same the other way.
"""

import dataclasses
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cv2jax.config import UserError
from cv2jax.convert.extras import import_official, refuse_pointer
from cv2jax.convert.rules import ForeignTensor, Index, Shape
from cv2jax.files import whole_file

MAX_BYTES = 2**31 - 1  # of a protobuf message
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_GRAPH, _GRAPH_TENSOR = 7, 5  # ModelProto.graph, GraphProto.initializer
_RAW_DATA = 9  # of TensorProto
_TYPED_DATA = (4, 5, 6, 7, 10, 11)  # float_data, int32_data, …
# Of raw data, where several share a byte; numpy gives each a byte of its own.
_PACKED_BITS = {
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "int2": 2,
    "uint2": 2,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
}


class UnknownGraph(UserError):
    """A sound ONNX file whose structure is not the one that is read here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor of a file is.

    Attributes:
      shape, dtype: of its values. file: that holds them. start, end: of the bytes there.
      encoded: whether the bytes are the whole protobuf message, with its values in typed fields; else they are the values.
    """

    shape: Shape
    dtype: np.dtype
    file: pathlib.Path
    start: int
    end: int
    encoded: bool = False

    def read(self, index: Index) -> Shaped[np.ndarray, "..."]:
        """The block `index`, a copy; UserError where a tensor has other values than its shape says."""
        if self.encoded:
            onnx = import_official("onnx")
            with self.file.open("rb") as file:
                file.seek(self.start)
                tensor = onnx.TensorProto.FromString(file.read(self.end - self.start))
            try:
                values = onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                why = " ".join(f"tensor {tensor.name}: {error}".split())
                raise UserError(f"{self.file}: is damaged ({why}); copy it again") from error
            return np.array(values[index], self.dtype)
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[index]
        little = self.dtype.newbyteorder("<")
        values = np.memmap(self.file, little, "r", self.start, self.shape or (1,)).reshape(self.shape)
        return np.array(values[index], self.dtype)


class OnnxFile:
    """A model on disk.

    Attributes:
      path: of the file. model: its `onnx.ModelProto` without the initialisers. tensors: those, by name.

    Raises UserError for a file that is missing, damaged or cut off, or whose external data are; UnknownGraph for one that is
    sound as far as can be told, but has tensors of a type that is not read here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.tensors: dict[str, StoredTensor] = {}
        self._unknown = ""  # why, told when all else is found sound
        self._onnx = import_official("onnx")
        decode_error = import_official("google.protobuf.message").DecodeError
        refuse_pointer(self.path)
        try:
            with self.path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise self._damaged("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self.model = self._onnx.ModelProto.FromString(self._read_model(data))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); give a file that is there") from error
        except (decode_error, UnicodeDecodeError) as error:
            raise self._damaged("it is not ONNX") from error
        nodes = self.model.graph.node
        if not nodes:
            raise self._damaged("it has no graph")
        self._check_texts(*(text for node in nodes for text in (node.name, node.op_type, *node.input, *node.output)))
        if self._unknown:
            raise UnknownGraph(f"{self.path}: {self._unknown}")

    def _check_texts(self, *names: Any) -> None:
        if not all(isinstance(name, str) for name in names):  # protobuf hands out as bytes what is no UTF-8
            raise self._damaged("a name is no text")

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path}: is damaged ({' '.join(why.split())}); copy it again")

    def _fields(self, data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(number, wire type, start of the field, start of its value, end) of each field of a message."""
        at = start
        while at < end:
            field = at
            key, at = self._varint(data, at, end)
            wire, size = key & 7, 0
            value = at
            if wire == _VARINT:
                _, at = self._varint(data, at, end)
            elif wire == _BYTES:
                size, at = self._varint(data, at, end)
                value = at
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise self._damaged("it is not ONNX")
            at += size
            if at > end:
                raise self._damaged(f"cut off at {end} of at least {at} bytes")
            yield key >> 3, wire, field, value, at

    def _varint(self, data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise self._damaged(f"cut off at {end} bytes")
            value |= (data[at] & 0x7F) << shift
            at += 1
            if not data[at - 1] & 0x80:
                return value, at
        raise self._damaged("it is not ONNX")

    def _read_model(self, data: mmap.mmap) -> bytes:
        """The message without its initialisers, which go to `tensors`."""
        rest = bytearray()
        for number, wire, field, value, end in self._fields(data, 0, len(data)):
            if (number, wire) == (_MODEL_GRAPH, _BYTES):
                graph = self._read_graph(data, value, end)
                rest += _key(number) + _encode_varint(len(graph)) + graph
            else:
                rest += data[field:end]
        return bytes(rest)

    def _read_graph(self, data: mmap.mmap, start: int, stop: int) -> bytes:
        rest = bytearray()
        for number, wire, field, value, end in self._fields(data, start, stop):
            if (number, wire) == (_GRAPH_TENSOR, _BYTES):
                self._read_tensor(data, value, end)
            else:
                rest += data[field:end]
        return bytes(rest)

    def _read_tensor(self, data: mmap.mmap, start: int, stop: int) -> None:
        header, raw, is_typed = bytearray(), None, False
        for number, _, field, value, end in self._fields(data, start, stop):
            if number == _RAW_DATA:
                raw = (value, end)
            elif number in _TYPED_DATA:
                is_typed = True
            else:
                header += data[field:end]
        tensor = self._onnx.TensorProto.FromString(bytes(header))
        name, shape = tensor.name, tuple(tensor.dims)
        self._check_texts(name)
        if min(shape, default=0) < 0:
            raise self._damaged(f"tensor {name} has the shape {list(shape)}")
        try:
            dtype = np.dtype(self._onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        except (KeyError, TypeError):
            self._unknown = f"tensor {name} is of the unknown type {tensor.data_type}"
            return
        if dtype.name in _PACKED_BITS:
            self._unknown = f"tensor {name} is of {dtype}, less than a byte each"
        place = {"shape": shape, "dtype": dtype}
        if tensor.data_location == self._onnx.TensorProto.EXTERNAL:
            self.tensors[name] = self._external(tensor, place)
        elif raw is None and is_typed:
            self.tensors[name] = StoredTensor(file=self.path, start=start, end=stop, encoded=True, **place)
        else:
            start, stop = raw or (stop, stop)
            self._check_size(name, stop - start, place)
            self.tensors[name] = StoredTensor(file=self.path, start=start, end=stop, **place)

    def _check_size(self, name: str, size: int, place: Mapping[str, Any]) -> None:
        must = _num_bytes(**place)
        if size != must:
            raise self._damaged(f"tensor {name} has {size} bytes of {must}")

    def _external(self, tensor: Any, place: Mapping[str, Any]) -> StoredTensor:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        self._check_texts(*entries, *entries.values())
        location = pathlib.PurePosixPath(entries.get("location", ""))
        # A model must not make us read what is not beside it.
        if not location.parts or location.is_absolute() or ".." in location.parts:
            raise self._damaged(f"tensor {tensor.name} lies in {str(location)!r}, outside its directory")
        file = self.path.parent / location
        if not file.is_file():
            raise UserError(f"{file}: is missing, and {self.path.name} keeps tensors in it; copy it to its side")
        numbers = {"offset": entries.get("offset") or 0, "length": entries.get("length") or _num_bytes(**place)}
        try:
            start, size = map(int, numbers.values())
        except ValueError:
            start, size = -1, -1
        if start < 0 or size < 0:
            said = ", ".join(f"{key} {value}" for key, value in numbers.items())
            raise self._damaged(f"tensor {tensor.name} lies at {said}")
        self._check_size(tensor.name, size, place)
        if start + size > file.stat().st_size:
            raise UserError(f"{file}: is damaged (cut off before the end of tensor {tensor.name}); copy it again")
        return StoredTensor(file=file, start=start, end=start + size, **place)


def _num_bytes(shape: Shape, dtype: np.dtype) -> int:
    """Of a tensor's raw values."""
    return -(-math.prod(shape) * _PACKED_BITS.get(dtype.name, 8 * dtype.itemsize) // 8)


def write_onnx(path: str | os.PathLike[str], model: Any, tensors: Mapping[str, ForeignTensor]) -> None:
    """Writes `model`, an `onnx.ModelProto` without initialisers, and `tensors` as those, in fp32: whole or not at all.

    One tensor is in memory at a time. Raises UserError for a tensor that is not finite, for more than 2 GB, and for a place
    that cannot be written.
    """
    path, onnx = pathlib.Path(path).absolute(), import_official("onnx")
    graph = model.graph.SerializeToString()
    headers = {}
    for name, tensor in tensors.items():
        proto = onnx.TensorProto(name=name, dims=tensor.shape, data_type=onnx.TensorProto.FLOAT)
        num_bytes = 4 * math.prod(tensor.shape)
        header = proto.SerializeToString() + _key(_RAW_DATA) + _encode_varint(num_bytes)
        headers[name] = _key(_GRAPH_TENSOR) + _encode_varint(len(header) + num_bytes) + header
    size = len(graph) + sum(len(headers[name]) + 4 * math.prod(tensors[name].shape) for name in tensors)
    if size > MAX_BYTES:
        raise UserError(
            f"{path}: {size} bytes are more than the 2 GB that an ONNX file can hold; export a smaller model"
        )
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    with whole_file(path, f"{path}: cannot be written ({{reason}}); make room or give another place") as file:
        file.write(rest.SerializeToString() + _key(_MODEL_GRAPH) + _encode_varint(size) + graph)
        for name, tensor in tensors.items():
            file.write(headers[name])
            file.write(_values(path, name, tensor))


def _values(path: pathlib.Path, name: str, tensor: ForeignTensor) -> memoryview:
    values = np.asarray(tensor.read(), "<f4", order="C")
    if values.shape != tensor.shape:
        raise ValueError(f"{name} is {values.shape} and was announced as {tensor.shape}")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name} is not finite, nothing is written; export an earlier checkpoint")
    return values.reshape(-1).view(np.uint8).data


def _key(number: int) -> bytes:
    """Of a field of bytes."""
    return _encode_varint(number << 3 | _BYTES)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
