"""Files of speech tokens, as `cv2jax encode` writes them: JSONL or npz, whole or not there at all.

    {"id": "a1", "audio": "wav/a1.wav", "speech_tokens": [4021, 17], "num_frames": 8, "seconds": 0.0812, "tokenizer": "9f…"}

An npz holds one int32 array an id, and `metadata`, a JSON object with the same `tokenizer`: the hash of the tokenizer's
sizes and parameters, by which a later stage refuses tokens that another tokenizer made.
"""

import contextlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int32

from cv2jax.config import UserError

SUFFIXES = (".jsonl", ".npz")
METADATA = "metadata"  # the one name in an npz that is no id


class TokenWriter:
    """Writes tokens one utterance at a time to a hidden file beside `path`, which `close` renames to `path`.

    Left by an exception, or never closed, it leaves no file at `path`; a file that was there before stays.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        self.path = check_token_path(path)
        self._metadata = metadata
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror}); give another --out") from None
        self._zip = zipfile.ZipFile(self._file, "w") if self.path.suffix == ".npz" else None

    def write(
        self, identity: str, audio: str, speech_tokens: Int32[np.ndarray, " L"], *, num_frames: int, seconds: float
    ) -> None:
        """Adds one utterance; `identity` must be new."""
        if self._zip is not None:
            with self._reported():
                self._write_array(identity, speech_tokens)
            return
        line = {
            "id": identity,
            "audio": audio,
            "speech_tokens": speech_tokens.tolist(),
            "num_frames": num_frames,
            "seconds": seconds,
            "tokenizer": self._metadata["tokenizer"],
        }
        with self._reported():
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Puts the file in its place."""
        with self._reported():
            if self._zip is not None:
                self._write_array(METADATA, np.array(json.dumps(self._metadata, ensure_ascii=False)))
                self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A full disk is one line."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot write ({error.strerror or error}); make room and run again") from None

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for file in filter(None, (self._zip, self._file)):
                with contextlib.suppress(OSError, ValueError):  # after a failure nothing more can be written
                    file.close()
            self._temporary.unlink(missing_ok=True)

    def _write_array(self, name: str, values: np.ndarray) -> None:
        assert self._zip is not None
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.asarray(values), allow_pickle=False)
        # A fixed date: equal tokens, equal bytes.
        self._zip.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getbuffer())


def check_token_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if its suffix names a format of tokens; else UserError."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix names the format of the tokens; use {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the file that is to hold the tokens")
    return path
