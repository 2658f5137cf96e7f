"""Speaker embeddings for a loader: by record, from the file of `cv2jax embed`, mapped so that all readers share one copy."""

import bisect
import hashlib
import os
import pathlib
import zipfile
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from cv2jax.config import UserError
from cv2jax.data.embeddings import EmbeddingFile
from cv2jax.data.shards import Record

Of = Literal["utterance", "speaker"]
_MEMBERS = {"utterance": ("ids", "embeddings"), "speaker": ("speakers", "speaker_embeddings")}
_LOCAL_HEADER = 30  # bytes, of which the last four are the lengths of the two fields behind it


class SpeakerVectors:
    """The raw vectors of a file, of each utterance (`of`) or the mean of its speaker's; a row takes 8 bytes of memory.

    `encoder` is the hash of what made them, `hash` that of the names and vectors in use, `dim` the size of a vector. Threads
    may share it; pickled, it takes its index along and maps the file anew. Raises UserError as `EmbeddingFile`, for a file
    that cannot be mapped, and where it is mapped anew and has changed.
    """

    def __init__(self, path: str | os.PathLike[str], of: Of) -> None:
        file = EmbeddingFile(path)  # reads all of it once: damage shows now
        self.path, self.of = file.path, of
        self.encoder, self.dim = file.encoder, file.dim
        self._names, self._vectors, self.hash = _map(self.path, of)
        self._order = np.argsort(self._names, kind="stable")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_names": None, "_vectors": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._names, self._vectors, found = _map(self.path, self.of)
        if found != self.hash:
            raise UserError(f"{self.path}: has changed since it was opened; start again, and it is read anew")

    def name(self, record: Record) -> str:
        """What the vector of a record goes by: its id or its speaker."""
        return record.id if self.of == "utterance" else record.speaker

    def find(self, record: Record) -> Float32[np.ndarray, " E"] | None:
        """The vector of a record; None where the file has none."""
        name = self.name(record)
        place = bisect.bisect_left(self._order, name, key=lambda row: str(self._names[row]))
        if place == len(self._order) or self._names[self._order[place]] != name:
            return None
        return np.array(self._vectors[self._order[place]])


def _map(path: pathlib.Path, of: Of) -> tuple[np.ndarray, np.ndarray, str]:
    """(names [N], vectors [N E], a hash of both) of an npz, mapped; UserError where its arrays do not lie there as they are."""
    digest, arrays = hashlib.sha256(), []
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            for name in _MEMBERS[of]:
                info = archive.getinfo(f"{name}.npy")
                digest.update(f"{info.filename}\n{info.file_size} {info.CRC}\n".encode())
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{name} is compressed")
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                fields = np.frombuffer(file.read(4), "<u2")
                file.seek(info.header_offset + _LOCAL_HEADER + int(fields.sum()))
                arrays.append(_map_array(path, file))
        if arrays[1].dtype != np.float32:
            raise ValueError(f"the vectors are {arrays[1].dtype}")
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error}); give the file of `cv2jax embed`") from None
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not as `cv2jax embed` writes it ({error}); run that again") from None
    return arrays[0], arrays[1], digest.hexdigest()


def _map_array(path: pathlib.Path, file: Any) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"arrays of format {version}")
    shape, is_fortran, dtype = read(file)
    if is_fortran and len(shape) > 1:
        raise ValueError("vectors lie in columns")
    return np.memmap(path, dtype, "r", file.tell(), shape)
