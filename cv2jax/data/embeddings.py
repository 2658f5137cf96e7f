"""Files of speaker embeddings, as `cv2jax embed` writes them: one npz, whole or not there at all.

    ids [N], embeddings [N E]                                of utterances, in the manifest's order
    speakers [S], speaker_embeddings [S E], num_utterances [S]   the mean of each speaker's, and of how many
    utterance_speaker [N]                                    positions in `speakers`
    metadata                                                 JSON: version, encoder (a hash), run, step

Vectors are fp32 and raw: L2-normalise to compare them.
"""

import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cv2jax.config import UserError
from cv2jax.files import whole_file
from cv2jax.shapes import Float32

VERSION = 1
SUFFIX = ".npz"


def check_embeddings_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if a file of embeddings can have that name; else UserError."""
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: embeddings are written as {SUFFIX}; give a file with that suffix")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the file that is to hold the embeddings")
    return path


def save_embeddings(
    path: str | os.PathLike[str],
    ids: Sequence[str],
    speakers: Sequence[str],
    embeddings: Float32[np.ndarray, "N E"],
    metadata: dict[str, Any],
) -> dict[str, int]:
    """Writes utterances and, of each speaker, the mean of the raw vectors; returns how many each mean is made of.

    `speakers` [N] are the utterances' own, `metadata` says at least the `encoder`. The file appears whole. Raises UserError
    where it cannot be written.
    """
    path = check_embeddings_path(path)
    bad = ~np.isfinite(embeddings).all(axis=1)
    if bad.any():
        first = ids[int(bad.argmax())]
        raise UserError(
            f"{path}: {bad.sum()} of {len(ids)} embeddings are not finite, that of {first!r} first; look at the encoder's run"
        )
    names, numbers = np.unique(np.asarray(speakers, np.str_), return_inverse=True)
    counts = np.bincount(numbers, minlength=len(names))
    sums = np.zeros((len(names), embeddings.shape[1]), np.float64)
    np.add.at(sums, numbers, embeddings)
    arrays = {
        "ids": np.asarray(ids, np.str_),
        "embeddings": embeddings.astype(np.float32),
        "speakers": names,
        "speaker_embeddings": (sums / counts[:, None]).astype(np.float32),
        "num_utterances": counts.astype(np.int32),
        "utterance_speaker": numbers.astype(np.int32),
        "metadata": np.asarray(json.dumps({"version": VERSION, **metadata}, ensure_ascii=False)),
    }
    with whole_file(path, f"{path}: cannot write ({{reason}}); make room or give another --out") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def pack_embeddings(ids: Sequence[str], speakers: Sequence[str], embeddings: Float32[np.ndarray, "N E"]) -> bytes:
    """The same bytes for the same utterances, their own speakers [N] and raw vectors: what a part of a job holds."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        ids=np.asarray(ids, np.str_),
        speakers=np.asarray(speakers, np.str_),
        embeddings=embeddings,
    )
    return buffer.getvalue()


def unpack_embeddings(data: bytes) -> tuple[list[str], list[str], Float32[np.ndarray, "N E"]]:
    """What `pack_embeddings` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return arrays["ids"].tolist(), arrays["speakers"].tolist(), arrays["embeddings"]


class EmbeddingFile:
    """The speaker embeddings of a file, by utterance id and by speaker; `encoder` is the hash of what made them.

    Raises UserError where the file cannot be read or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_embeddings_path(path)
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                ids, speakers = arrays["ids"].tolist(), arrays["speakers"].tolist()
                self.embeddings = arrays["embeddings"]
                self.speaker_embeddings = arrays["speaker_embeddings"]
                metadata = json.loads(str(arrays["metadata"]))
            self.encoder = str(metadata["encoder"])
            self._rows = {identity: row for row, identity in enumerate(ids)}
            self._speaker_rows = {name: row for row, name in enumerate(speakers)}
            for vectors, rows in ((self.embeddings, self._rows), (self.speaker_embeddings, self._speaker_rows)):
                if vectors.ndim != 2 or len(vectors) != len(rows) or not np.isfinite(vectors).all():
                    raise ValueError(f"{len(vectors)} vectors for {len(rows)} names, or not all of them finite")
        except OSError as error:
            raise UserError(
                f"{path}: cannot read ({error.strerror or error}); give the file of `cv2jax embed`"
            ) from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: no whole file of embeddings ({error}); run `cv2jax embed` again") from None

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return int(self.embeddings.shape[1])

    @property
    def ids(self) -> list[str]:
        """Of the utterances, in the file's order."""
        return list(self._rows)

    @property
    def speakers(self) -> list[str]:
        """Names of the speakers."""
        return list(self._speaker_rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, identity: str) -> bool:
        return identity in self._rows

    def utterance(self, identity: str) -> Float32[np.ndarray, " E"]:
        """The raw vector of one utterance; KeyError where the file has none of that id."""
        if identity not in self._rows:
            raise KeyError(f"{self.path} holds no embedding of utterance {identity!r}")
        return self.embeddings[self._rows[identity]]

    def speaker(self, name: str) -> Float32[np.ndarray, " E"]:
        """The mean of a speaker's raw vectors; KeyError where the file does not know the name."""
        if name not in self._speaker_rows:
            raise KeyError(f"{self.path} holds no embedding of speaker {name!r}")
        return self.speaker_embeddings[self._speaker_rows[name]]
