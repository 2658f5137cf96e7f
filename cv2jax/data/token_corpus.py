"""What the language model reads in place of audio: text and speech tokens of each utterance, ready, random access.

    DIR/index.json                        version, hash, metadata, counts per split, size and sha256 of every file
    DIR/text_tokenizer/…                  the tokenizer that made the text tokens
    DIR/splits/<split>/<column>.values    all utterances of a column behind one another: tokens, or UTF-8
    DIR/splits/<split>/<column>.ends      int64: where each utterance ends in them, in tokens or bytes
    DIR/splits/<split>/<column>.lengths   int32, only of the two token columns: tokens of each utterance

The directory appears whole or not at all. Everything is memory-mapped, so that 10^8 utterances open at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from cv2jax.config import UserError
from cv2jax.data.shards import sync_and_hash, sync_directory

FORMAT_VERSION = 1
TEXT_TOKENIZER = "text_tokenizer"

_TOKEN_COLUMNS = ("text_tokens", "speech_tokens")
_TEXT_COLUMNS = ("id", "text", "speaker", "language")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # it names a directory
_END, _LENGTH = struct.Struct("<q"), struct.Struct("<i")
_BUFFER_BYTES = 1 << 18
_MEND = "write the token corpus again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCorpusMetadata:
    """Which tokenizers made the tokens: their hashes and the sizes of their vocabularies; how text is prefixed."""

    speech_tokenizer: str
    num_codes: int
    text_tokenizer: str
    vocabulary_size: int
    prefix: str  # the mode, such as "none" or "speaker"; the text tokens contain the prefix
    normalizer: str = ""  # that read the texts; "": none did


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """One utterance: its identity, its text and the tokens of both."""

    id: str
    text: str
    text_tokens: Int[np.ndarray, " T"]
    speech_tokens: Int[np.ndarray, " L"]
    speaker: str
    language: str


class TokenCorpusWriter:
    """Writes a token corpus one utterance at a time into a hidden directory, which `close` renames to `directory`.

    The caller copies the text tokenizer into `text_tokenizer`. Left by an exception, or never closed, it leaves nothing.
    Raises UserError for a directory that holds something, and for one that cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], metadata: TokenCorpusMetadata) -> None:
        self.directory = pathlib.Path(os.path.abspath(directory))
        self._metadata = metadata
        self._temporary = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.tmp")
        self._splits: dict[str, _SplitWriter] = {}
        with self._reported():
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                raise UserError(f"{directory}: exists and is not empty; give a new directory, or remove it first")
            shutil.rmtree(self._temporary, ignore_errors=True)  # of a killed process with our number
            self.text_tokenizer.mkdir(parents=True)

    @property
    def text_tokenizer(self) -> pathlib.Path:
        """The directory that the caller fills with the text tokenizer before it closes the corpus."""
        return self._temporary / TEXT_TOKENIZER

    def write(self, split: str, record: TokenRecord) -> None:
        """Adds one utterance, whose id must be new; UserError for a token outside its vocabulary."""
        _check_tokens(record.id, "text", record.text_tokens, self._metadata.vocabulary_size)
        _check_tokens(record.id, "speech", record.speech_tokens, self._metadata.num_codes)
        with self._reported():
            if split not in self._splits:
                if not _SPLIT_NAME.fullmatch(split):
                    raise UserError(f'split "{split}" must be letters, digits, "_", "-" or "." (it names a directory)')
                self._splits[split] = _SplitWriter(self._temporary / "splits" / split, self._metadata)
            self._splits[split].write(record)

    def close(self) -> None:
        """Puts the corpus in its place; UserError if it holds no utterance."""
        if not self._splits:
            raise UserError(f"{self.directory}: no utterance to write; check what the input left out")
        with self._reported():
            for writer in self._splits.values():
                writer.close()
            paths = sorted(path for path in self._temporary.rglob("*") if path.is_file())
            index = {
                "version": FORMAT_VERSION,
                "metadata": dataclasses.asdict(self._metadata),
                "splits": {name: writer.counts for name, writer in self._splits.items()},
                "files": {path.relative_to(self._temporary).as_posix(): _describe(path) for path in paths},
            }
            index |= {"hash": _hash_index(index)}
            with open(self._temporary / "index.json", "w", encoding="utf-8") as file:
                json.dump(index, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(self._temporary, self.directory)
            sync_directory(self.directory.parent)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A full disk is one line."""
        try:
            yield
        except OSError as error:
            problem = error.strerror or error
            raise UserError(f"{self.directory}: cannot write ({problem}); make room, or give another") from None

    def __enter__(self) -> "TokenCorpusWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for writer in self._splits.values():
                with contextlib.suppress(OSError):  # after a failure nothing more can be written
                    writer.close()
            shutil.rmtree(self._temporary, ignore_errors=True)


class TokenSplit:
    """The utterances of one split: random access by row, memory-mapped, picklable."""

    def __init__(self, root: pathlib.Path, name: str, num_utterances: int, metadata: TokenCorpusMetadata) -> None:
        self._directory = root / "splits" / name
        self._num_utterances, self._metadata = num_utterances, metadata
        self.name = name
        self._open()

    def _open(self) -> None:
        self._lengths = {column: self._map(column, "lengths", np.int32) for column in _TOKEN_COLUMNS}
        self._ends = {column: self._map(column, "ends", np.int64) for column in (*_TOKEN_COLUMNS, *_TEXT_COLUMNS)}
        dtypes = _value_dtypes(self._metadata)
        self._values = {column: self._map(column, "values", dtype) for column, dtype in dtypes.items()}
        for column, values in self._values.items():
            if len(values) != self._ends[column][-1]:
                raise UserError(f"{self._directory / column}.values: not as long as its ends say; {_MEND}")

    def _map(self, column: str, part: str, dtype: Any) -> np.ndarray:
        path = self._directory / f"{column}.{part}"
        try:
            # An empty file cannot be mapped: a column of texts may be empty throughout.
            values = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read ({error}); {_MEND}") from None
        if part != "values" and len(values) != self._num_utterances:
            raise UserError(f"{path}: {len(values)} rows, but index.json says {self._num_utterances}; {_MEND}")
        return values

    def __len__(self) -> int:
        return self._num_utterances

    @property
    def num_text(self) -> Int32[np.ndarray, "N"]:
        """Text tokens of each utterance."""
        return self._lengths["text_tokens"]

    @property
    def num_speech(self) -> Int32[np.ndarray, "N"]:
        """Speech tokens of each utterance (25 Hz)."""
        return self._lengths["speech_tokens"]

    def read(self, row: int) -> TokenRecord:
        """The utterance of one row, its tokens int32; UserError naming split and row where the files are damaged."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of split {self.name!r} with {len(self)} utterances")
        fields: dict[str, Any] = {column: self._slice(column, row).astype(np.int32) for column in _TOKEN_COLUMNS}
        try:
            fields |= {column: self._slice(column, row).tobytes().decode() for column in _TEXT_COLUMNS}
        except UnicodeDecodeError as error:
            raise UserError(f"{self._directory}: row {row} is damaged ({error}); {_MEND}") from None
        return TokenRecord(**fields)

    def _slice(self, column: str, row: int) -> np.ndarray:
        ends = self._ends[column]
        return self._values[column][ends[row - 1] if row else 0 : ends[row]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lengths", "_ends", "_values")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class TokenCorpus:
    """A token corpus; opening it checks that every file has the size that index.json gives.

    Raises UserError where the directory is no token corpus, or where a file is missing or cut short.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory)
        path = self.directory / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if (version := index["version"]) != FORMAT_VERSION:
                raise UserError(f"{directory}: format version {version}, this is {FORMAT_VERSION}; {_MEND}")
            self.hash = str(index.pop("hash"))
            if _hash_index(index) != self.hash:
                raise ValueError("its hash differs from its contents")
            self.metadata = TokenCorpusMetadata(**index["metadata"])
            self._counts = {name: int(counts["num_utterances"]) for name, counts in index["splits"].items()}
            self._files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in index["files"].items()}
        except OSError as error:
            problem = f"cannot read index.json: {error.strerror}"
            raise UserError(f"{directory} is not a token corpus ({problem}); write one first") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # ValueError: also no JSON
            raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); {_MEND}") from None
        for name, (num_bytes, _) in self._files.items():
            size = path.stat().st_size if (path := self.directory / name).is_file() else None
            if size != num_bytes:
                problem = "is missing" if size is None else f"is truncated or changed: {size} of {num_bytes} bytes"
                raise UserError(f"{path} {problem}; {_MEND}")

    @property
    def text_tokenizer(self) -> pathlib.Path:
        """The directory of the tokenizer that made the text tokens."""
        return self.directory / TEXT_TOKENIZER

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order they were written."""
        return tuple(self._counts)

    def split(self, name: str) -> TokenSplit:
        """Opens a split; UserError naming those there are."""
        if name not in self._counts:
            raise UserError(f"{self.directory}: no split {name!r}; it has {', '.join(self._counts)}")
        return TokenSplit(self.directory, name, self._counts[name], self.metadata)

    def verify(self) -> None:
        """Reads every file and compares its sha256; UserError naming the first damaged one."""
        for name, (_, sha256) in self._files.items():
            with open(self.directory / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise UserError(f"{file.name} is damaged: its sha256 differs from index.json; {_MEND}")


def _describe(path: pathlib.Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sync_and_hash(path)}


def _hash_index(index: dict[str, Any]) -> str:
    """Of everything: the index holds the hash of each file."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _value_dtypes(metadata: TokenCorpusMetadata) -> dict[str, Any]:
    """Little-endian, the smallest that holds the vocabulary."""
    sizes = {"text_tokens": metadata.vocabulary_size, "speech_tokens": metadata.num_codes}
    tokens = {column: np.dtype("<u2" if size <= 1 << 16 else "<u4") for column, size in sizes.items()}
    return tokens | dict.fromkeys(_TEXT_COLUMNS, np.dtype(np.uint8))


def _check_tokens(identity: str, kind: str, tokens: Int[np.ndarray, " T"], size: int) -> None:
    outside = (tokens < 0) | (tokens >= size)
    if outside.any():
        at = int(outside.argmax())
        raise UserError(
            f'utterance "{identity}": {kind} token {tokens[at]} at {at} lies outside the vocabulary of {size};'
            " were the tokens made by the tokenizer that the corpus names?"
        )


class _SplitWriter:
    """The columns of one split as open files."""

    def __init__(self, directory: pathlib.Path, metadata: TokenCorpusMetadata) -> None:
        directory.mkdir(parents=True)
        self._dtypes = _value_dtypes(metadata)
        self._ends = dict.fromkeys(self._dtypes, 0)
        self._num_utterances = 0
        parts = [(column, part) for column in self._dtypes for part in ("values", "ends")]
        parts += [(column, "lengths") for column in _TOKEN_COLUMNS]
        self._files = {(c, p): open(directory / f"{c}.{p}", "wb", _BUFFER_BYTES) for c, p in parts}  # noqa: SIM115

    def write(self, record: TokenRecord) -> None:
        try:
            values = {column: np.frombuffer(getattr(record, column).encode(), np.uint8) for column in _TEXT_COLUMNS}
        except UnicodeEncodeError as error:
            raise UserError(f"utterance {record.id!a}: not UTF-8 ({error.reason}); leave it out") from None
        values |= {column: getattr(record, column) for column in _TOKEN_COLUMNS}
        for column, dtype in self._dtypes.items():
            self._ends[column] += len(values[column])
            self._files[column, "values"].write(values[column].astype(dtype).tobytes())
            self._files[column, "ends"].write(_END.pack(self._ends[column]))
        for column in _TOKEN_COLUMNS:
            self._files[column, "lengths"].write(_LENGTH.pack(len(values[column])))
        self._num_utterances += 1

    @property
    def counts(self) -> dict[str, int]:
        tokens = {f"num_{column}": self._ends[column] for column in _TOKEN_COLUMNS}
        return {"num_utterances": self._num_utterances} | tokens

    def close(self) -> None:
        for file in self._files.values():
            file.close()
