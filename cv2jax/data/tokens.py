"""Files of speech tokens, as `cv2jax encode` writes them: JSONL or npz, whole or not there at all.

    {"id": "a1", "audio": "wav/a1.wav", "speech_tokens": [4021, 17], "num_frames": 8, "seconds": 0.0812, "tokenizer": "9f…"}

An npz holds one int32 array an id, and `metadata`, a JSON object with the same `tokenizer`: the hash of the tokenizer's
sizes and parameters, by which a later stage refuses tokens that another tokenizer made.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import threading
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int32

from cv2jax.config import UserError
from cv2jax.files import temporary_beside

SUFFIXES = (".jsonl", ".npz")
METADATA = "metadata"  # the one name in an npz that is no id


class TokenWriter:
    """Writes tokens one utterance at a time to a hidden file beside `path`, which `close` renames to `path`.

    Left by an exception, or never closed, it leaves no file at `path`; a file that was there before stays.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
        self.path = check_token_path(path)
        self._metadata = metadata
        self._temporary = temporary_beside(self.path)
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
        with self._reported():
            self._file.write(
                token_line(
                    identity,
                    audio,
                    speech_tokens,
                    num_frames=num_frames,
                    seconds=seconds,
                    tokenizer=self._metadata["tokenizer"],
                )
            )

    def write_lines(self, lines: bytes) -> None:
        """Adds the utterances of whole lines of `token_line`, whose tokenizer must be this file's."""
        with self._reported():
            if self._zip is None:
                self._file.write(lines)
                return
            for line in lines.splitlines():
                identity, speech_tokens, _ = _parse_line(line)
                self._write_array(identity, speech_tokens)

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


def token_line(
    identity: str,
    audio: str,
    speech_tokens: Int32[np.ndarray, " L"],
    *,
    num_frames: int,
    seconds: float,
    tokenizer: str,
) -> bytes:
    """One utterance as a line of JSONL: `num_frames` log-mel frames (100 Hz), `seconds` of audio, the tokenizer's hash."""
    line = {
        "id": identity,
        "audio": audio,
        "speech_tokens": speech_tokens.tolist(),
        "num_frames": num_frames,
        "seconds": seconds,
        "tokenizer": tokenizer,
    }
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def check_token_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if its suffix names a format of tokens; else UserError."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix names the format of the tokens; use {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the file that is to hold the tokens")
    return path


class SpeechTokenFile:
    """The speech tokens of a file by id, or in the file's order; of JSONL, memory holds 16 bytes an utterance, no tokens.

    `tokenizer` is the hash of the tokenizer that made them, `hash` that of the content: of JSONL its sha256, of npz that
    of its names, sizes and CRCs. All tokens lie below `num_codes`: an npz states it (0 where not), of JSONL it is one
    more than the largest. Threads may share it; pickled, it takes the index of JSONL along and opens an npz anew. Raises
    UserError where the file cannot be read or is damaged, where it holds an id twice, and where its tokens come from two
    tokenizers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_token_path(path)
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        self._hashes, self._offsets = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self.tokenizer, self.hash, self.num_codes = "", "", 0
        with _damage_reported(self.path):
            if self.path.suffix == ".npz":
                self._archive = zipfile.ZipFile(self.path)
                self._read_directory(self._archive)
            else:
                self._index_lines()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        if self.path.suffix == ".npz":
            with _damage_reported(self.path):
                self._archive = zipfile.ZipFile(self.path)

    def __len__(self) -> int:
        return len(self._offsets) if self._archive is None else len(self._archive.NameToInfo) - 1

    def __contains__(self, identity: str) -> bool:
        if self._archive is None:
            return any(found == identity for found, _ in self._read_lines(identity))
        return identity != METADATA and f"{identity}.npy" in self._archive.NameToInfo

    def read(self, identity: str) -> Int32[np.ndarray, " L"]:
        """The tokens of one utterance; KeyError where the file has none of that id."""
        if self._archive is None:
            for found, tokens in self._read_lines(identity):
                if found == identity:
                    return tokens
        elif identity in self:
            with _damage_reported(self.path), self._lock:
                tokens = _check_array(_read_array(self._archive, identity))
                if self.num_codes and tokens.max(initial=-1) >= self.num_codes:
                    raise ValueError(f'"{identity}" has token {tokens.max()}, of {self.num_codes} codes')
                return tokens
        raise KeyError(f"{self.path} holds no tokens of {identity!r}")

    def __iter__(self) -> Iterator[tuple[str, Int32[np.ndarray, " L"]]]:
        return read_speech_tokens(self.path)

    def _read_directory(self, archive: zipfile.ZipFile) -> None:
        metadata = json.loads(str(_read_array(archive, METADATA)))
        self.tokenizer, self.num_codes = str(metadata["tokenizer"]), int(metadata.get("num_codes", 0))
        digest = hashlib.sha256()
        for info in archive.infolist():
            digest.update(f"{info.filename}\n{info.file_size} {info.CRC}\n".encode("utf-8", "surrogatepass"))
        self.hash = digest.hexdigest()

    def _index_lines(self) -> None:
        hashes, offsets, digest = array("Q"), array("q"), hashlib.sha256()
        offset, tokenizer = 0, None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                identity, tokens, made_by = _parse_line(line, number)
                if made_by != (tokenizer := tokenizer or made_by):
                    raise ValueError(
                        f"line {number}: made by tokenizer {made_by[:12]}, those before by {tokenizer[:12]}"
                    )
                hashes.append(_hash(identity))
                offsets.append(offset)
                offset += len(line)
                digest.update(line)
                self.num_codes = max(self.num_codes, 1 + int(tokens.max(initial=-1)))
        if tokenizer is None:
            raise ValueError("it holds no utterance")
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
        self._hashes = np.frombuffer(hashes, np.uint64)[order]
        self._offsets = np.frombuffer(offsets, np.int64)[order]
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            (one, _), (other, _) = list(self._read_places(int(place), int(place) + 2))
            if one == other:
                raise ValueError(f'id "{one}" occurs twice')
        self.tokenizer, self.hash = tokenizer, digest.hexdigest()

    def _read_lines(self, identity: str) -> Iterator[tuple[str, np.ndarray]]:
        """The utterances whose id has the same hash: seldom more than one."""
        key = np.uint64(_hash(identity))
        first, end = (int(np.searchsorted(self._hashes, key, side)) for side in ("left", "right"))
        return self._read_places(first, end)

    def _read_places(self, first: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
        for offset in self._offsets[first:end].tolist():
            with _damage_reported(self.path), open(self.path, "rb") as file:
                file.seek(offset)
                identity, tokens, _ = _parse_line(file.readline())
            yield identity, tokens


def read_speech_tokens(path: str | os.PathLike[str]) -> Iterator[tuple[str, Int32[np.ndarray, " L"]]]:
    """Ids and tokens of a token file in its order, one utterance at a time; UserError where it is damaged."""
    path = check_token_path(path)
    with _damage_reported(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if (identity := name.removesuffix(".npy")) != METADATA:
                        yield identity, _check_array(_read_array(archive, identity))
        else:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    identity, tokens, _ = _parse_line(line, number)
                    yield identity, tokens


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@contextlib.contextmanager
def _damage_reported(path: pathlib.Path) -> Iterator[None]:
    """What cannot be read is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: no whole token file ({error}); run `cv2jax encode` again") from None


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_array(tokens: np.ndarray) -> Int32[np.ndarray, " L"]:
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError("speech tokens must be a list of integers")
    if tokens.size and not -(2**31) <= tokens.min() <= tokens.max() < 2**31:
        raise ValueError("a speech token does not fit 32 bits")
    if tokens.size and tokens.min() < 0:
        raise ValueError("a speech token is negative")
    return tokens.astype(np.int32)


def _parse_line(line: bytes, number: int | None = None) -> tuple[str, np.ndarray, str]:
    """Id, tokens and tokenizer of a line; ValueError naming the line."""
    try:
        fields = json.loads(line)
        identity, made_by = fields["id"], fields["tokenizer"]
        if not isinstance(identity, str) or not isinstance(made_by, str):
            raise ValueError("id and tokenizer must be strings")
        return identity, _check_array(np.array(fields["speech_tokens"])), made_by
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        where = "" if number is None else f"line {number}: "
        raise ValueError(f"{where}{type(error).__name__}: {error}") from None
