"""Writing the index of a corpus from its shards: streamed, deterministic, and touching nothing that already agrees."""

import dataclasses
import filecmp
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from cv2jax.config import UserError
from cv2jax.data.shards import COLUMN_DTYPES, FORMAT_VERSION, Record, ShardSummary, ShardWriter, sync_directory
from cv2jax.files import temporary_beside
from cv2jax.text.characters import normalize_transcript


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardColumns:
    """What the index keeps of one shard: a value per record, and how often each character occurs."""

    summary: ShardSummary
    num_samples: list[int]
    num_characters: list[int]
    speaker: list[str]
    language: list[str]
    characters: dict[str, int]


class ColumnCollector:
    """Gathers `ShardColumns` record by record."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in COLUMN_DTYPES}
        self._characters: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Adds one record's values."""
        text = normalize_transcript(record.text or "")
        self._characters.update(text)
        self._values["num_samples"].append(len(record.waveform))
        self._values["num_characters"].append(len(text))
        self._values["speaker"].append(record.speaker)
        self._values["language"].append(record.language)

    def finish(self, summary: ShardSummary) -> ShardColumns:
        """Returns the columns of the shard that `summary` describes."""
        return ShardColumns(summary=summary, characters=dict(sorted(self._characters.items())), **self._values)


def write_index(
    root: str | os.PathLike[str], *, rate_hz: int, encoding: str, read_shards: Callable[[], Iterator[ShardColumns]]
) -> bool:
    """Writes columns, names and, last, index.json; returns False where everything was already so.

    `read_shards` yields the shards in order, a split's shards together; it is called twice (count, then fill), so that
    no more than one shard's values are in memory.
    """
    root = pathlib.Path(root)
    (root / "index").mkdir(parents=True, exist_ok=True)
    splits, shards, speakers, languages = _count(read_shards)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {rate_hz} {encoding}".encode())
    changed = write_json(root / "speakers.json", speakers)
    changed |= write_json(root / "languages.json", languages)
    changed |= _fill_columns(root, splits, speakers, languages, read_shards, digest)
    for part in (speakers, languages, splits, [(shard["file"], shard["sha256"]) for shard in shards]):
        digest.update(json.dumps(part).encode())
    for summary in splits.values():
        summary["seconds"] = round(summary["num_samples"] / rate_hz, 3)
    index = {
        "version": FORMAT_VERSION,
        "rate_hz": rate_hz,
        "encoding": encoding,
        "hash": digest.hexdigest(),
        "splits": splits,
        "shards": shards,
    }
    kept = {f"{split}.{column}.npy" for split in splits for column in COLUMN_DTYPES}
    for path in (root / "index").iterdir():
        if path.name not in kept:
            path.unlink()
    return write_json(root / "index.json", index) or changed


def write_corpus(
    root: str | os.PathLike[str],
    splits: dict[str, Iterable[Record]],
    *,
    rate_hz: int,
    encoding: str = "flac",
    shard_utterances: int = 256,
) -> None:
    """Writes a whole corpus from records in memory or from a generator: for tests and small made-up corpora."""
    root = pathlib.Path(root)
    finished: list[ShardColumns] = []
    for split, records in splits.items():
        iterator, number = iter(records), 0
        while True:
            path = root / "shards" / shard_name(split, number)
            writer, columns = ShardWriter(path, split, encoding), ColumnCollector()
            for _, record in zip(range(shard_utterances), iterator, strict=False):
                writer.write(record)
                columns.add(record)
            summary = writer.commit()
            if summary is None:
                break
            finished.append(columns.finish(summary))
            number += 1
        if not number:
            raise UserError(f"{root}: split {split!r} holds no record")
    write_index(root, rate_hz=rate_hz, encoding=encoding, read_shards=lambda: iter(finished))


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.arrayrecord"


def write_json(path: pathlib.Path, value: Any) -> bool:
    """Writes JSON durably and all at once; returns False, touching nothing, where the file already holds it."""
    return write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> bool:
    """Writes a file durably and all at once; returns False, touching nothing, where it already holds the same."""
    if path.is_file() and path.read_bytes() == data:
        return False
    temporary = temporary_beside(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)
    return True


def _count(
    read_shards: Callable[[], Iterator[ShardColumns]],
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], list[str], list[str]]:
    """First pass: totals per split, the shard list, and all names in sorted order."""
    totals: dict[str, dict[str, Any]] = {}
    characters: dict[str, Counter[str]] = {}
    split_speakers: dict[str, set[str]] = {}
    languages: set[str] = set()
    shards = []
    for shard in read_shards():
        summary = shard.summary
        shards.append(dataclasses.asdict(summary))
        total = totals.setdefault(summary.split, {"num_utterances": 0, "num_samples": 0})
        total["num_utterances"] += summary.num_records
        total["num_samples"] += summary.num_samples
        characters.setdefault(summary.split, Counter()).update(shard.characters)
        split_speakers.setdefault(summary.split, set()).update(shard.speaker)
        languages.update(shard.language)
    for split, total in totals.items():
        total["characters"] = dict(sorted(characters[split].items()))
        total["num_speakers"] = len(split_speakers[split])
    return totals, shards, sorted(set().union(*split_speakers.values())), sorted(languages)


def _fill_columns(
    root: pathlib.Path,
    splits: dict[str, dict[str, Any]],
    speakers: list[str],
    languages: list[str],
    read_shards: Callable[[], Iterator[ShardColumns]],
    digest: Any,
) -> bool:
    """Second pass: writes each column through a memory map, adds it to the digest, keeps equal files untouched."""
    positions = {
        "speaker": {name: position for position, name in enumerate(speakers)},
        "language": {name: position for position, name in enumerate(languages)},
    }
    if len(languages) > np.iinfo(COLUMN_DTYPES["language"]).max:
        raise UserError(f"{len(languages)} different languages: the field `language` seems to hold something else")
    maps: dict[tuple[str, str], np.memmap] = {}
    for split, total in splits.items():
        for column, dtype in COLUMN_DTYPES.items():
            path, shape = _temporary(root, split, column), (total["num_utterances"],)
            maps[split, column] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    row = dict.fromkeys(splits, 0)
    for shard in read_shards():
        split, end = shard.summary.split, row[shard.summary.split] + shard.summary.num_records
        for column in COLUMN_DTYPES:
            values = getattr(shard, column)
            if column in positions:
                values = [positions[column][name] for name in values]
            maps[split, column][row[split] : end] = values
        row[split] = end
    changed = False
    for split, column in list(maps):
        maps.pop((split, column)).flush()
        temporary, path = _temporary(root, split, column), root / "index" / f"{split}.{column}.npy"
        with open(temporary, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
            os.fsync(file.fileno())
        if path.is_file() and filecmp.cmp(temporary, path, shallow=False):
            temporary.unlink()
        else:
            os.replace(temporary, path)
            changed = True
    sync_directory(root / "index")
    return changed


def _temporary(root: pathlib.Path, split: str, column: str) -> pathlib.Path:
    return root / "index" / f".{split}.{column}.npy.tmp"
