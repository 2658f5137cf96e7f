"""The files of a bundle: its manifest, its hashes, its arrays; and the refusal of what is damaged, missing or too new.

BUNDLE/bundle.json     what all of it is; of it, too, any changed byte is found
BUNDLE/parameters/     STAGE.safetensors, names as paths in a tree: backbone/blocks_0/mlp/up/kernel
BUNDLE/programs/       NAME.stablehlo: serialised `jax.export`
BUNDLE/tokenizer/      the text tokenizer, in Qwen2's format
BUNDLE/voices/         NAME.safetensors
BUNDLE/golden/         STAGE.npz: what is asked of a stage, and what the fp32 model answers
"""

import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cv2jax.config import UserError
from cv2jax.files import whole_file

MANIFEST, SCHEMA = "bundle.json", 1
PARAMETERS, PROGRAMS, TOKENIZER, VOICES, GOLDEN = "parameters", "programs", "tokenizer", "voices", "golden"
EXPORT_AGAIN = "cv2jax export --to bundle --from_bundle"
_NOT_WRITTEN = "cannot be written ({reason}); give a place with room"
_BLOCK = 1 << 22  # bytes read at once
_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a directory says that it is a bundle; `read_manifest` then says if it is whole."""
    return os.path.lexists(pathlib.Path(path, MANIFEST))


def write_manifest(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Writes bundle.json with the schema's version and a hash over all else in it."""
    about = {**manifest, "schema": SCHEMA}
    about["sha256"] = _digest(about)
    with whole_file(pathlib.Path(path, MANIFEST), f"{path}: {_NOT_WRITTEN}") as file:
        file.write(_to_json(about).encode())


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What bundle.json says.

    Raises UserError for a place that is no bundle, one of a newer schema, and for a manifest that is cut short or of which
    any byte has changed.
    """
    place = pathlib.Path(path, MANIFEST)
    try:
        text = place.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no bundle (it has no {MANIFEST}); give a directory of `export --to bundle`") from None
    except OSError as error:
        raise UserError(
            f"{place}: cannot be read ({error.strerror}); give a directory of `export --to bundle`"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{place}: is damaged (no UTF-8); copy the bundle again") from None
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: is damaged (no JSON); copy the bundle again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(f"{place}: a bundle of schema {schema}, this cv2jax reads {SCHEMA}; update cv2jax")
    # The text itself is compared, so that no byte is outside of the hash.
    if schema != SCHEMA or manifest.get("sha256") != _digest(manifest) or text != _to_json(manifest):
        raise UserError(f"{place}: is damaged (its hash does not fit what it says); copy the bundle again")
    return manifest


def describe_files(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Name in the bundle → size and SHA-256 of each file but the manifest."""
    root = pathlib.Path(path)
    found = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    return {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in found}


def check_files(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> float:
    """Reads every file that the manifest names, and returns the seconds that took.

    Raises UserError, naming the file, for one that is missing, cut short, or of which any byte has changed.
    """
    start = time.perf_counter()
    for name, about in manifest["files"].items():
        file = pathlib.Path(path, name)
        try:
            size = file.stat().st_size
            if size != about["bytes"]:
                raise UserError(f"{file}: has {size} bytes, the bundle's {about['bytes']}; copy the bundle again")
            found = hash_file(file)
        except FileNotFoundError:
            raise UserError(f"{file}: is missing; copy the bundle again") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); copy the bundle again") from None
        if found != about["sha256"]:
            raise UserError(
                f"{file}: is damaged (its SHA-256 is {found[:12]}, the bundle's {about['sha256'][:12]}); copy the bundle"
                " again"
            )
    return time.perf_counter() - start


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_arrays(path: str | os.PathLike[str], arrays: Iterable[tuple[str, Any]]) -> None:
    """Writes (name, array) as safetensors, one after the other and aligned to 64 bytes: none is held twice.

    Raises ValueError for a type that no stage has.
    """
    named, header, end = list(arrays), dict[str, Any](), 0
    for name, array in named:
        if array.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} is of {array.dtype}")
        start, end = end, end + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with whole_file(path, f"{path}: {_NOT_WRITTEN}") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in named:
            file.write(np.ascontiguousarray(np.asarray(array)).tobytes())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, whole or not at all; UserError where it cannot be written."""
    with whole_file(path, f"{path}: {_NOT_WRITTEN}") as file:
        file.write(data)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name → array of a safetensors file, mapped and not read; bfloat16, which the package's reader for numpy lacks, too.

    Raises UserError for a file that is no such.
    """
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
        length = int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        return {name: _array(mapped[8 + length :], about) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no safetensors of a bundle ({reason}); copy the bundle again") from None


def _array(data: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    (start, end), dtype, shape = about["data_offsets"], _DTYPES[about["dtype"]], tuple(about["shape"])
    if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= len(data):
        raise ValueError("an array of another size than its shape")
    return data[start:end].view(dtype).reshape(shape)


def _to_json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def _digest(about: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(_to_json(rest).encode()).hexdigest()
