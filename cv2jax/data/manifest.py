"""The manifest: one JSON object a line naming an utterance, checked without holding the file in memory.

    {"id": "a1", "audio": "wav/a1.wav", "text": "Hello.", "speaker": "anna", "language": "en", "split": "train"}

`text` may be null; `instruct` is optional; other fields are ignored. `audio` is absolute, or relative to the manifest's
directory, or `archive.tar::member`. Ids are unique in the whole file.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt16, UInt32, UInt64
from tqdm import tqdm

from cv2jax.config import UserError

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FIELDS = ("id", "audio", "text", "speaker", "language", "split")
# A file with this many bad lines is the wrong file: stop instead of filling memory with complaints.
_MAX_BAD_LINES = 100_000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utterance:
    """One line of a manifest; `audio` is still relative to the manifest's directory."""

    id: str
    audio: str
    text: str | None
    speaker: str
    language: str
    split: str
    instruct: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why one line of a manifest is not used; `id` is None where the line does not say one."""

    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ManifestScan:
    """Where the good lines are (columns over good lines, in file order) and what is wrong with the others."""

    path: pathlib.Path
    splits: tuple[str, ...]  # in order of first appearance
    offset: UInt64[np.ndarray, "N"]  # byte offset of each line
    line: UInt32[np.ndarray, "N"]  # line number, from 1
    split: UInt16[np.ndarray, "N"]  # position in `splits`
    refused: tuple[Refusal, ...]

    def rows(self, split: str) -> np.ndarray:
        """Positions of one split's lines, in file order."""
        return np.flatnonzero(self.split == self.splits.index(split))


def parse_utterance(line: bytes) -> Utterance:
    """Returns the utterance on one line; ValueError with the reason where the line is not one."""
    values = _parse_object(line)
    for field in _FIELDS:
        if field not in values:
            raise ValueError(f'field "{field}" is missing')
    for field in (*_FIELDS, "instruct"):
        value = values.get(field)
        if value is None and field in ("text", "instruct"):
            continue
        if not isinstance(value, str):
            nullable = " or null" if field in ("text", "instruct") else ""
            raise ValueError(f'field "{field}" must be a string{nullable}, is {json.dumps(value)[:40]}')
        if not value and field not in ("text", "instruct"):
            raise ValueError(f'field "{field}" is empty')
        if not _is_unicode(value):
            raise ValueError(f'field "{field}" holds half of a surrogate pair: {json.dumps(value)[:40]}')
    if not _SPLIT_NAME.fullmatch(values["split"]):
        raise ValueError(f'split "{values["split"]}" must be letters, digits, "_", "-" or "." (it names files)')
    return Utterance(instruct=values.get("instruct"), **{field: values[field] for field in _FIELDS})


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON of a manifest (nested too deep)") from None
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object: {line.decode('utf-8').strip()[:40]}")
    return values


def scan_manifest(path: str | os.PathLike[str], *, strict: bool = False) -> ManifestScan:
    """Checks every line once: about 32 bytes of memory a line, duplicate ids included.

    `strict` raises UserError at the first bad line; otherwise bad lines are listed, and of lines with the same id the
    first is kept. A missing file, or one without any utterance, raises UserError always.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest (expected a JSONL file, one utterance a line)")
    offsets, lines, split_ids, digests = array("Q"), array("I"), array("H"), array("Q")
    splits: dict[str, int] = {}
    refused: list[Refusal] = []
    for number, offset, line in _read_lines(path):
        try:
            utterance = parse_utterance(line)
        except ValueError as error:
            refusal = Refusal(line=number, id=_find_id(line), reason=str(error))
            _add_refusal(path, refused, refusal, strict=strict)
            continue
        offsets.append(offset)
        lines.append(number)
        split_ids.append(splits.setdefault(utterance.split, len(splits)))
        digests.append(int.from_bytes(hashlib.blake2b(utterance.id.encode(), digest_size=8).digest(), "little"))
    if not offsets:
        hint = f"; first bad line: {refused[0].line}: {refused[0].reason}" if refused else ""
        raise UserError(f"{path}: holds no utterance (one JSON object a line){hint}")
    columns = {
        "offset": np.frombuffer(offsets, np.uint64),
        "line": np.frombuffer(lines, np.uint32),
        "split": np.frombuffer(split_ids, np.uint16),
    }
    repeated = _find_duplicates(path, np.frombuffer(digests, np.uint64), columns)
    for refusal in repeated.values():
        _add_refusal(path, refused, refusal, strict=strict)
    if repeated:
        keep = np.ones(len(columns["line"]), bool)
        keep[list(repeated)] = False
        columns = {name: column[keep] for name, column in columns.items()}
    refused.sort(key=lambda refusal: refusal.line)
    return ManifestScan(path=path, splits=tuple(splits), refused=tuple(refused), **columns)


def read_manifest(path: str | os.PathLike[str]) -> Iterator[Utterance]:
    """Yields every utterance after checking the whole file; UserError with file and line at the first bad one."""
    scan = scan_manifest(path, strict=True)
    with open(scan.path, "rb") as file:
        for offset in scan.offset:
            file.seek(int(offset))
            yield parse_utterance(file.readline())


def write_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> int:
    """Writes a manifest (all or nothing) and returns the number of lines; UserError for text that no file can hold."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for utterance in utterances:
                values: dict[str, Any] = dataclasses.asdict(utterance)
                if utterance.instruct is None:
                    del values["instruct"]
                broken = [name for name, value in values.items() if value is not None and not _is_unicode(value)]
                if broken:
                    raise UserError(f"{path}: utterance {utterance.id!a}: {broken[0]} holds half of a surrogate pair")
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _read_lines(path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields (line number, byte offset, line) of the lines that are not blank, with progress where it takes long."""
    offset = 0
    with (
        open(path, "rb") as file,
        tqdm(
            total=path.stat().st_size, desc="manifest", unit="B", unit_scale=True, delay=3, leave=False, disable=None
        ) as progress,
    ):
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number % 10_000 == 0:
                progress.update(offset - progress.n)
            if number == 1 and line.startswith(_BYTE_ORDER_MARK):
                start, line = start + len(_BYTE_ORDER_MARK), line[len(_BYTE_ORDER_MARK) :]
            if line.strip():
                yield number, start, line


def _add_refusal(path: pathlib.Path, refused: list[Refusal], refusal: Refusal, *, strict: bool) -> None:
    if strict:
        raise UserError(f"{path}:{refusal.line}: {refusal.reason}")
    refused.append(refusal)
    if len(refused) > _MAX_BAD_LINES:
        first = refused[0]
        raise UserError(f"{path}: over {_MAX_BAD_LINES} bad lines, the first is line {first.line}: {first.reason}")


def _find_id(line: bytes) -> str | None:
    try:
        found = _parse_object(line).get("id")
    except ValueError:
        return None
    return found if isinstance(found, str) and _is_unicode(found) else None


def _is_unicode(text: str) -> bool:
    """False where JSON's escapes left half of a surrogate pair (an emoji cut in two), which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_duplicates(path: pathlib.Path, digests: np.ndarray, columns: dict[str, np.ndarray]) -> dict[int, Refusal]:
    """Returns the rows whose id an earlier row has; equal 8-byte digests are candidates, the ids themselves decide."""
    ordered = np.sort(digests)
    suspects = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    found: dict[int, Refusal] = {}
    if not len(suspects):
        return found
    first_line: dict[str, int] = {}
    with open(path, "rb") as file:
        for row in np.flatnonzero(np.isin(digests, suspects)):
            file.seek(int(columns["offset"][row]))
            identity, line = parse_utterance(file.readline()).id, int(columns["line"][row])
            if identity in first_line:
                reason = f'duplicate id "{identity}" (first on line {first_line[identity]})'
                found[int(row)] = Refusal(line=line, id=identity, reason=reason)
            else:
                first_line[identity] = line
    return found
