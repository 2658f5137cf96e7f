"""The prepared corpus on disk: records of speech in random-access shards (ArrayRecord) and a columnar index.

    OUT/index.json                 version, rate, encoding, hash, counts per split, list of shards with size and sha256
    OUT/speakers.json, languages.json   names; the columns hold positions in these lists
    OUT/index/<split>.<column>.npy one number per record: num_samples, num_characters, speaker, language
    OUT/shards/<split>-00000.arrayrecord

One record is a little-endian uint32 header length, a JSON header and the audio payload (16-bit FLAC or raw PCM, mono).
Columns are memory-mapped and never become Python lists, so that an index of 10^8 records opens at once.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int16

from cv2jax.config import UserError
from cv2jax.files import temporary_beside

FORMAT_VERSION = 1
ENCODINGS = ("flac", "pcm16")
COLUMN_DTYPES = {"num_samples": np.int32, "num_characters": np.int32, "speaker": np.int32, "language": np.int16}

_INDEX_KEYS = ("rate_hz", "encoding", "hash", "splits", "shards")
_SPLIT_KEYS = ("num_utterances", "num_samples", "seconds", "characters")
_SHARD_KEYS = ("file", "split", "num_records", "bytes", "sha256")
_HEADER_LENGTH = struct.Struct("<I")
# One record a group gives O(1) access; FLAC does not shrink further, so the container does not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Open files per process: a corpus may have more shards than the system has file handles.
_MAX_OPEN_SHARDS = 64
_MEND = "run `cv2jax prepare` again on the same directory with --verify to redo what is damaged"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One utterance: its identity, text and speech (mono 16-bit samples at `rate_hz`)."""

    id: str
    text: str | None
    speaker: str
    language: str
    instruct: str | None = None
    rate_hz: int
    waveform: Int16[np.ndarray, "W"]


def encode_record(record: Record, encoding: str) -> bytes:
    """Returns the bytes of a record, its audio as "flac" (16 bit, lossless) or "pcm16"."""
    samples = np.ascontiguousarray(record.waveform, dtype="<i2")
    header = {
        "id": record.id,
        "text": record.text,
        "speaker": record.speaker,
        "language": record.language,
        "instruct": record.instruct,
        "num_samples": len(samples),
        "rate_hz": record.rate_hz,
        "encoding": encoding,
    }
    header_bytes = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if encoding == "flac":
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, record.rate_hz, format="FLAC", subtype="PCM_16")
        payload = buffer.getvalue()
    elif encoding == "pcm16":
        payload = samples.tobytes()
    else:
        raise UserError(f"unknown audio encoding {encoding!r}; choose one of {', '.join(ENCODINGS)}")
    return _HEADER_LENGTH.pack(len(header_bytes)) + header_bytes + payload


def decode_record(data: bytes) -> Record:
    """Returns the record held in `data`; ValueError where the bytes are not one whole record."""
    if len(data) < _HEADER_LENGTH.size:
        raise ValueError("record is shorter than its header")
    (header_length,) = _HEADER_LENGTH.unpack_from(data)
    start = _HEADER_LENGTH.size + header_length
    header = json.loads(data[_HEADER_LENGTH.size : start])
    if header["encoding"] == "flac":
        waveform, _ = soundfile.read(io.BytesIO(data[start:]), dtype="int16")
    else:
        waveform = np.frombuffer(data, dtype="<i2", offset=start).astype(np.int16)
    if len(waveform) != header["num_samples"]:
        raise ValueError(f"record {header['id']!r} holds {len(waveform)} of {header['num_samples']} samples")
    fields = {name: header[name] for name in ("id", "text", "speaker", "language", "instruct", "rate_hz")}
    return Record(waveform=waveform, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What index.json says of one shard."""

    file: str
    split: str
    num_records: int
    num_samples: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes one shard under a temporary name; `commit` makes it durable and visible at once, or it never existed."""

    def __init__(self, path: str | os.PathLike[str], split: str, encoding: str) -> None:
        self._path = pathlib.Path(path)
        self._temporary = temporary_beside(self._path)
        self._split = split
        self._encoding = encoding
        self._writer: ArrayRecordWriter | None = None  # opened by the first record: no record, no file
        self._num_records = 0
        self._num_samples = 0

    def write(self, record: Record) -> None:
        """Appends one record."""
        data = encode_record(record, self._encoding)
        try:
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
            self._writer.write(data)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self._path}: cannot write ({_first_line(error)})") from None
        self._num_records += 1
        self._num_samples += len(record.waveform)

    def commit(self) -> ShardSummary | None:
        """Closes, syncs and renames the shard; returns its summary, None where no record was written."""
        if self._writer is None:
            return None
        writer, self._writer = self._writer, None
        try:
            writer.close()
        except RuntimeError as error:
            raise UserError(f"{self._path}: cannot write ({_first_line(error)})") from None
        sha256 = sync_and_hash(self._temporary)
        num_bytes = self._temporary.stat().st_size
        os.replace(self._temporary, self._path)
        return ShardSummary(
            file=self._path.name,
            split=self._split,
            num_records=self._num_records,
            num_samples=self._num_samples,
            bytes=num_bytes,
            sha256=sha256,
        )

    def abort(self) -> None:
        """Closes and removes what was written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            # What cannot be written (a full disk) is thrown away here anyhow.
            with contextlib.suppress(RuntimeError):
                writer.close()
        self._temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def sync_and_hash(path: str | os.PathLike[str]) -> str:
    """Forces a file to disk and returns its sha256 in hex."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Forces the names in a directory to disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ReaderCache:
    """At most `_MAX_OPEN_SHARDS` open readers of this process; a forked child starts with none."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, ArrayRecordReader] = OrderedDict()

    def get(self, path: str) -> ArrayRecordReader:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            reader = self._readers.get(path)
            if reader is None:
                reader = ArrayRecordReader(path, _READER_OPTIONS)
                self._readers[path] = reader
            self._readers.move_to_end(path)
            # An evicted reader closes when the last thread that still reads from it lets go.
            while len(self._readers) > _MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader


class Split:
    """The records of one split: random access by row, columns memory-mapped, picklable, safe to read from threads."""

    def __init__(self, root: pathlib.Path, name: str, summary: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self._root = root
        self._summary = summary
        self._shards = [(shard["file"], shard["num_records"]) for shard in shards]
        self._last_row = np.cumsum([num_records for _, num_records in self._shards])
        self.name = name
        self._open()

    def _open(self) -> None:
        self._readers = _ReaderCache()
        self._columns = {column: self._load_column(column) for column in COLUMN_DTYPES}

    def _load_column(self, column: str) -> np.ndarray:
        path = self._root / "index" / f"{self.name}.{column}.npy"
        try:
            values = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read this column of the index ({error}); {_MEND}") from None
        if len(values) != len(self):
            raise UserError(f"{path}: {len(values)} rows, but index.json says {len(self)}; {_MEND}")
        return values

    def __len__(self) -> int:
        return int(self._summary["num_utterances"])

    @property
    def num_samples(self) -> np.ndarray:
        """int32 [rows]: samples of each record at the corpus rate."""
        return self._columns["num_samples"]

    @property
    def num_characters(self) -> np.ndarray:
        """int32 [rows]: characters of each normalised transcript, 0 where there is no text."""
        return self._columns["num_characters"]

    @property
    def speaker(self) -> np.ndarray:
        """int32 [rows]: position in the corpus's `speakers`."""
        return self._columns["speaker"]

    @property
    def language(self) -> np.ndarray:
        """int16 [rows]: position in the corpus's `languages`."""
        return self._columns["language"]

    @property
    def characters(self) -> dict[str, int]:
        """How often each character occurs in the normalised transcripts of this split."""
        return dict(self._summary["characters"])

    @property
    def seconds(self) -> float:
        """Length of the speech in this split."""
        return float(self._summary["seconds"])

    def read(self, row: int) -> Record:
        """Returns the record of one row; UserError naming shard and record where the shard is damaged."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of split {self.name!r} with {len(self)} records")
        shard = int(np.searchsorted(self._last_row, row, side="right"))
        file, num_records = self._shards[shard]
        position = int(row - (self._last_row[shard] - num_records))
        path = self._root / "shards" / file
        try:
            reader = self._readers.get(str(path))
            if reader.num_records() != num_records:
                raise ValueError(f"it holds {reader.num_records()} of {num_records} records")
            return decode_record(reader.read([position])[0])
        # RuntimeError: ArrayRecord and libsndfile (LibsndfileError) both report damage with it.
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path}: record {position} cannot be read ({_first_line(error)}); {_MEND}") from None

    def __iter__(self) -> Iterator[Record]:
        return (self.read(row) for row in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_columns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class Corpus:
    """A prepared corpus; opening it checks that every shard has the size that index.json gives.

    Raises UserError where the directory is no corpus, or where a shard is missing or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.index = self._load_json("index.json")
        if not isinstance(self.index, dict):
            raise UserError(f"{self.path / 'index.json'}: not a JSON object; {_MEND}")
        if self.index.get("version") != FORMAT_VERSION:
            found = self.index.get("version")
            raise UserError(f"{self.path}: format version {found}, this is {FORMAT_VERSION}; prepare the corpus again")
        self._check_keys()
        self._check_sizes()

    def _load_json(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            hint = "run `cv2jax prepare MANIFEST OUT` to its end"
            raise UserError(f"{self.path} is not a prepared corpus (no {name}); {hint}")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # also what is not UTF-8
            raise UserError(f"{path}: not JSON ({error}); {_MEND}") from None

    def _check_keys(self) -> None:
        try:
            parts = [(self.index, _INDEX_KEYS)]
            parts += [(summary, _SPLIT_KEYS) for summary in self.index["splits"].values()]
            parts += [(shard, _SHARD_KEYS) for shard in self.index["shards"]]
            for part, keys in parts:
                for key in keys:
                    part[key]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / 'index.json'}: is damaged ({error!r}); {_MEND}") from None

    def _check_sizes(self) -> None:
        # One directory scan, not one call a shard: a large corpus has tens of thousands.
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.path / "shards")}
        except OSError:
            sizes = {}
        for shard in self.index["shards"]:
            path, size = self.path / "shards" / shard["file"], sizes.get(shard["file"])
            if size is None:
                raise UserError(f"{path} is missing; {_MEND}")
            if size != shard["bytes"]:
                raise UserError(f"{path} is truncated or changed: {size} of {shard['bytes']} bytes; {_MEND}")

    def verify(self) -> None:
        """Reads every shard and compares its sha256; UserError naming the first damaged one."""
        for shard in self.index["shards"]:
            path = self.path / "shards" / shard["file"]
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise UserError(f"{path} is damaged: its sha256 differs from index.json; {_MEND}")

    @property
    def rate_hz(self) -> int:
        """Sample rate of every record."""
        return int(self.index["rate_hz"])

    @property
    def hash(self) -> str:
        """Hash over everything a trainer sees of this corpus."""
        return str(self.index["hash"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.index["splits"])

    @property
    def speakers(self) -> list[str]:
        """Speaker names; a record's `speaker` column is a position here."""
        return self._load_json("speakers.json")

    @property
    def languages(self) -> list[str]:
        """Language names; a record's `language` column is a position here."""
        return self._load_json("languages.json")

    def split(self, name: str) -> Split:
        """Returns one split; UserError that lists the splits where there is none of that name."""
        if name not in self.index["splits"]:
            raise UserError(f"{self.path}: no split {name!r}; it has {', '.join(self.splits)}")
        shards = [shard for shard in self.index["shards"] if shard["split"] == name]
        return Split(self.path, name, self.index["splits"][name], shards)
