"""PyTorch's `.pt` files as foreign tensors: read without running anything and one tensor at a time, and written so.

A file is a zip whose `data.pkl` describes a flat dictionary of tensors, and whose entries `data/N` are their bytes. torch
reads the description, with its weights-only unpickler, and maps the bytes. Of the way back only the description is
pickled; the bytes follow as they are made, which `torch.save` cannot do.
"""

import collections
import functools
import io
import math
import os
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Shaped

from cv2jax.config import UserError
from cv2jax.convert.extras import import_official, refuse_pointer
from cv2jax.convert.rules import ForeignTensor, Index, Shape
from cv2jax.files import utf8_path

_COUNTERS = ("epoch", "step")  # of a training checkpoint; the official loader trips over them (spec/official.md 1.3)
_MAPPED_BYTES = 1 << 27  # read since the file was mapped: its pages count as ours until the map goes
_ALIGNMENT = 64  # of a tensor's bytes in the file, as torch aligns them
_PADDING = 0x4246  # the kind of extra field that torch fills up with
_ZIP = b"PK\x03\x04"
_LOOKED_THROUGH = 1 << 20  # bytes of a file that is perhaps a pickle
_LOCAL_HEADER, _ZIP64_FIELD, _EXTRA_HEADER = 30, 20, 4  # bytes


def load_values(path: pathlib.Path) -> Any:
    """What a `.pt` file of tensors, numbers, texts, lists and dictionaries holds, its tensors mapped and not yet read.

    Nothing in the file is run. Raises UserError for no such file, for one that is damaged, cut short, of torch before 1.6
    or no file of torch, and for one that names code.
    """
    torch = import_official("torch")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; copy the whole directory")
    refuse_pointer(path)
    place = utf8_path(path, "torch")
    with path.open("rb") as file:
        starts_as_zip = file.read(len(_ZIP)) == _ZIP
    if not zipfile.is_zipfile(path):
        known = "is cut short" if starts_as_zip else "is no file of torch.save (1.6 or newer)"
        raise UserError(f"{path}: {known}; copy it again")
    try:
        return torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?|function) ([\w.]+\.\w+)", str(error))
        what = f"names code ({named[1]})" if named else "holds more than tensors"
        raise UserError(
            f"{path}: {what}, and was refused; nothing of it was run; give a file of plain tensors"
        ) from None
    except Exception as error:  # whatever a damaged file makes torch raise
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: is a TorchScript archive, which is code, and was refused; nothing of it was run; give a file of plain"
                " tensors"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: cannot be read ({reason}); copy it again") from None


def may_be_pickled(path: pathlib.Path) -> bool:
    """Whether a file that need not be torch's starts as `torch.save` starts one, or is a pickle of any kind that names code."""
    with path.open("rb") as file:
        start = file.read(_LOOKED_THROUGH)
    if not start or start.startswith((_ZIP, pickle.PROTO)):  # an empty one may have been anything
        return True
    try:
        return any(_names_code(code.name, said) for code, said, _ in pickletools.genops(start))
    except ValueError:  # of what is no pickle
        return False


def _names_code(code: str, said: Any) -> bool:
    if code in ("GLOBAL", "INST"):
        return re.fullmatch(r"[\w.]+ [\w.]+", said) is not None
    return code == "STACK_GLOBAL"


@functools.cache
def _torch_kinds() -> tuple[Any, dict[Any, np.dtype]]:
    """(torch, its dtypes that weights may have and ours)."""
    torch = import_official("torch")
    kinds = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: jnp.bfloat16}
    return torch, {theirs: np.dtype(ours) for theirs, ours in kinds.items()}


def _is_count(value: Any) -> bool:
    torch, _ = _torch_kinds()
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


class TorchReader:
    """The tensors of a `.pt` file with a flat state dict; a `Reader` of the rule engine.

    The counters of a training checkpoint are left out, with a line in the log. Raises UserError as `load_values`, and for a
    file that holds something else than tensors by name.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.place, self._path = str(path), path
        self._tensors = self._load()
        counters = [name for name in _COUNTERS if _is_count(self._tensors.get(name))]
        if counters:
            said = ", ".join(f"{name} {int(self._tensors[name])}" for name in counters)
            logging.info("%s: is of a training (%s); these counters are left out", path, said)
        self._names = {
            name: self._describe(name, value) for name, value in self._tensors.items() if name not in counters
        }
        if not self._names:
            raise UserError(f"{path}: holds no tensors; copy it again")
        self._num_bytes = 0

    def _load(self) -> dict[str, Any]:
        values = load_values(self._path)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError(f"{self.place}: holds a {type(values).__name__}; give a state dict, tensors by their names")
        return values

    def _describe(self, name: str, value: Any) -> tuple[Shape, np.dtype]:
        torch, kinds = _torch_kinds()
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            if isinstance(value, dict) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
                raise UserError(
                    f"{self.place}: its tensors lie under the key '{name}'; save what is there as a file of its own"
                )
            raise UserError(f"{self.place}: {name} is a {type(value).__name__} and no plain tensor; give a state dict")
        if value.dtype not in kinds:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{self.place}: {name} is {kind}; give weights in fp32, bf16 or fp16")
        return tuple(value.shape), kinds[value.dtype]

    def names(self) -> Mapping[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of every tensor, from the file's description."""
        return self._names

    def read(self, name: str, index: Index) -> Shaped[np.ndarray, "..."]:
        """The block `index` of a tensor, in its own dtype, a view of the file; UserError for values that are not finite."""
        if self._num_bytes > _MAPPED_BYTES:
            self._tensors, self._num_bytes = self._load(), 0
        values = as_numpy(self._tensors[name])[(*index, ...)]
        self._num_bytes += values.nbytes
        # The least and the greatest pass NaN on, and need no array beside.
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise UserError(
                f"{self.place}: {name} has values that are not finite; copy it again, or take an earlier one"
            )
        return values

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors are one in the file, or equal bit for bit."""
        a, b = self._tensors[one], self._tensors[other]
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return True
        if not a.ndim:
            return bool(a == b)
        rows = max(1, _MAPPED_BYTES // max(1, a[:1].nbytes))  # some at a time: a comparison makes an array
        rest = (slice(None),) * (a.ndim - 1)
        cuts = [(slice(start, start + rows), *rest) for start in range(0, len(a), rows)]
        return all(np.array_equal(_bits(self.read(one, cut)), _bits(self.read(other, cut))) for cut in cuts)


def _bits(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def as_numpy(tensor: Any) -> Shaped[np.ndarray, "..."]:
    """A tensor's memory, which numpy cannot name where it is bf16."""
    torch, tensor = import_official("torch"), tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def write_state_dict(path: pathlib.Path, tensors: Mapping[str, ForeignTensor], tied: Mapping[str, str] = {}) -> None:
    """Writes a state dict that `torch.load(…, weights_only=True)` reads, in fp32, one tensor in memory at a time.

    Args:
      path: new file. tensors: by name, in the order of the file.
      tied: names that are another tensor over again, with the same storage; they stand behind it.

    Raises UserError for values that are not finite.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(tensors):
        numbers[name] = number
        numbers |= {other: number for other, first in tied.items() if first == name}
    shapes = {name: tuple(tensors[tied.get(name, name)].shape) for name in numbers}
    small = {
        "data.pkl": _describe_state_dict(numbers, shapes),
        ".storage_alignment": b"%d" % _ALIGNMENT,
        "byteorder": b"little",
    }
    root = path.stem
    with path.open("wb") as raw:
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
            for name, data in small.items():
                _write_entry(archive, raw, f"{root}/{name}", len(data), lambda data=data: data)
            for name, tensor in tensors.items():
                read = functools.partial(_fp32_bytes, path, name, tensor)
                _write_entry(archive, raw, f"{root}/data/{numbers[name]}", 4 * math.prod(tensor.shape), read)
            _write_entry(archive, raw, f"{root}/version", 2, lambda: b"3\n")
        raw.flush()
        os.fsync(raw.fileno())


def _fp32_bytes(path: pathlib.Path, name: str, tensor: ForeignTensor) -> memoryview:
    values = np.asarray(tensor.read(), dtype="<f4", order="C")
    if values.shape != tuple(tensor.shape):
        raise ValueError(f"{name} is {values.shape}, not {tensor.shape}")
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise UserError(f"{path}: {name} has values that are not finite; nothing was written")
    return values.reshape(-1).view(np.uint8).data


def _write_entry(
    archive: zipfile.ZipFile, raw: IO[bytes], name: str, size: int, read: Callable[[], bytes | memoryview]
) -> None:
    """One uncompressed entry, padded by an extra field so that its bytes start at a multiple of _ALIGNMENT."""
    entry = zipfile.ZipInfo(name)  # of 1980: the same tensors give the same file
    entry.file_size = size
    is_long = size * 1.05 > zipfile.ZIP64_LIMIT  # then zipfile adds a field of its own
    start = raw.tell() + _LOCAL_HEADER + len(name.encode()) + _EXTRA_HEADER + is_long * _ZIP64_FIELD
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w") as file:
        file.write(read())


class _Storage(NamedTuple):
    """Stands for the fp32 storage `data/number` of so many elements."""

    number: int
    size: int


class _Tensor(NamedTuple):
    """Stands for a whole storage in a shape."""

    storage: _Storage
    shape: Shape


class _Pickler(pickle.Pickler):
    """Writes tensors and storages as torch does (format of torch.save since 1.6)."""

    def persistent_id(self, obj: Any) -> Any:
        """What a storage is called in the description."""
        if not isinstance(obj, _Storage):
            return None
        return "storage", import_official("torch").FloatStorage, str(obj.number), "cpu", obj.size

    def reducer_override(self, obj: Any) -> Any:
        """How a tensor is made of its storage."""
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        hooks: dict[str, Any] = collections.OrderedDict()
        return import_official("torch")._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, strides, False, hooks)


def _describe_state_dict(numbers: Mapping[str, int], tensors: Mapping[str, Shape]) -> bytes:
    out = io.BytesIO()
    entries = [(name, _Tensor(_Storage(numbers[name], math.prod(shape)), shape)) for name, shape in tensors.items()]
    _Pickler(out, protocol=2).dump(collections.OrderedDict(entries))
    return out.getvalue()
