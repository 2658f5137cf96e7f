"""The work of a job in n parts, each made by a machine of its own, and put together again in the order of the rows.

The rows of a manifest are cut into blocks of consecutive rows, and part i of n takes the blocks i-1, i-1+n, i-1+2n, …:
a function of the manifest and n alone, and of no part a stretch of longer audio than the others'.

    OUT.part-2-of-8           one line of JSON (facts, blocks with size, sha256 and counts), then what the blocks hold
    OUT.part-2-of-8.blocks/   while that is in the making: a file of the same form for each finished block

Every file appears whole, so a kill costs the block in the making, and machines that make the same part do no harm.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from absl import logging

from cv2jax.config import UserError
from cv2jax.files import whole_file

_BLOCK_ROWS, _BLOCK_BATCH_SECONDS = 1024, 120.0
_VERSION = 1
_NAMED = 8  # missing parts
_MAX_HEADER_BYTES = 1 << 30

Facts = dict[str, str | int | float | None]
Counts = dict[str, int | float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def path(self, out: str | os.PathLike[str]) -> pathlib.Path:
        """Where this part of `out` goes."""
        out = pathlib.Path(out)
        return out.with_name(f"{out.name}.part-{self.number}-of-{self.count}")

    def blocks(self, num_blocks: int) -> range:
        """The blocks of this part, of `num_blocks` in all."""
        return range(self.number - 1, num_blocks, self.count)


def parse_part(text: str) -> Part:
    """The part that "i/n" names, 1 <= i <= n; else UserError."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--part {text}: give i/n with 1 <= i <= n, for example 1/8, or auto under a launcher")
    return Part(number=int(found[1]), count=int(found[2]))


def choose_block_rows(block_rows: int, batch_seconds: float) -> int:
    """`block_rows`, where not 0; else 1024 for each 120 s of a batch, so that unfilled last batches cost 2 % of the work."""
    if block_rows < 0:
        raise UserError(f"block_rows={block_rows}: give a number of rows, or 0 for one that fits the batches")
    fits = batch_seconds / _BLOCK_BATCH_SECONDS if 0 < batch_seconds < math.inf else 1
    return block_rows or _BLOCK_ROWS * math.ceil(fits)


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, in hex; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """What a block came to: the bytes that `merge` gets back, numbers that add up, and on which device it was made."""

    payload: bytes
    counts: Counts
    device: str


class PartWriter:
    """Makes one part block by block; what an earlier run of the same facts finished is kept.

    Args:
      out: the whole job's file. facts: all that decides the bytes (hashes of manifest and model, options).
    """

    def __init__(self, out: str | os.PathLike[str], part: Part, facts: Facts, num_blocks: int) -> None:
        self.path = part.path(out)
        self._blocks = part.blocks(num_blocks)
        self._directory = self.path.with_name(f"{self.path.name}.blocks")
        self._facts = _facts(facts, part, num_blocks)
        self._error = (
            f"{self.path}: cannot write ({{reason}}); make room and give the same command: finished blocks are kept"
        )

    def complete(self) -> bool:
        """Whether the part is there, of the same facts, and no byte is missing."""
        try:
            header, start = _read_header(self.path)
            size = start + sum(block["bytes"] for block in header["blocks"])
            return header["facts"] == self._facts and size == self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def missing(self) -> list[int]:
        """The blocks that are still to be made."""
        if self.complete():
            return []
        if self.path.exists():
            logging.warning("%s: is damaged or of another manifest, model or options, and is made again", self.path)
        return [number for number in self._blocks if self._load(number) is None]

    def add(self, number: int, block: Block) -> None:
        """Writes a finished block; it survives a kill from here on."""
        entry = {
            "number": number,
            "bytes": len(block.payload),
            "sha256": hashlib.sha256(block.payload).hexdigest(),
            "counts": block.counts,
            "device": block.device,
        }
        with whole_file(self._block_path(number), self._error) as file:
            file.write(_header(self._facts, [entry]) + block.payload)

    def close(self) -> Counts:
        """Puts the part in its place, where another machine has not, and returns its counts."""
        if not self.complete():
            found = [self._load(number) for number in self._blocks]
            if None not in found:
                with whole_file(self.path, self._error) as file:
                    file.write(_header(self._facts, [entry for entry, _ in filter(None, found)]))
                    for _, payload in filter(None, found):
                        file.write(payload)
            elif not self.complete():
                raise UserError(f"{self._directory}: lost blocks that were finished; give the same command again")
        shutil.rmtree(self._directory, ignore_errors=True)
        return _sum_counts(_read_header(self.path)[0]["blocks"])

    def _block_path(self, number: int) -> pathlib.Path:
        return self._directory / f"{number:06d}"

    def _load(self, number: int) -> tuple[dict[str, Any], bytes] | None:
        """A finished block's entry and bytes; None where it is not there, damaged, or of other facts."""
        path = self._block_path(number)
        try:
            header, start = _read_header(path)
            payload = path.read_bytes()[start:]
            [entry] = header["blocks"]
            same = header["facts"] == self._facts and entry["number"] == number
            return (entry, payload) if same and hashlib.sha256(payload).hexdigest() == entry["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class PartSet:
    """All parts of `out`, found beside it and checked: none is missing, and they belong together.

    `counts` adds up what they did. Raises UserError otherwise, and where they are not of `wanted`.
    """

    def __init__(self, out: str | os.PathLike[str], wanted: Facts) -> None:
        self._paths = _find_parts(pathlib.Path(out))
        self._headers: list[dict[str, Any]] = []
        self._starts: list[list[int]] = []
        for path in self._paths:
            header, starts = _read_part(path)
            self._headers.append(header)
            self._starts.append(starts)
        for number, (path, header) in enumerate(zip(self._paths, self._headers, strict=True), 1):
            expected = {**self.facts, **wanted, "part": number, "num_parts": len(self._paths)}
            for name, value in expected.items():
                if (theirs := header["facts"].get(name)) != value:
                    where = self._paths[0] if name in self.facts and name not in wanted else "this command"
                    mend = "give every part and --merge the same command"
                    raise UserError(f"{path}: is of {name}={_short(theirs)}, {where} of {_short(value)}; {mend}")
        entries = [entry for header in self._headers for entry in header["blocks"]]
        self.counts = _sum_counts(entries)
        devices = sorted({entry["device"] for entry in entries})
        if len(devices) > 1:
            logging.warning(
                "the parts were made on %s, which round differently: one machine may differ", ", ".join(devices)
            )

    @property
    def facts(self) -> Facts:
        """What the parts have in common."""
        return self._headers[0]["facts"]

    def __iter__(self) -> Iterator[bytes]:
        """What the blocks hold, in the order of the rows; UserError where one is damaged."""
        for number in range(int(self.facts["num_blocks"] or 0)):
            place, part = divmod(number, len(self._paths))
            entry, path = self._headers[part]["blocks"][place], self._paths[part]
            with open(path, "rb") as file:
                file.seek(self._starts[part][place])
                payload = file.read(entry["bytes"])
            if entry["number"] != number or hashlib.sha256(payload).hexdigest() != entry["sha256"]:
                raise UserError(f"{path}: is damaged; remove it and run that part again")
            yield payload


def _facts(facts: Facts, part: Part, num_blocks: int) -> Facts:
    return {**facts, "num_parts": part.count, "num_blocks": num_blocks, "part": part.number, "version": _VERSION}


def _header(facts: Facts, blocks: list[dict[str, Any]]) -> bytes:
    return json.dumps({"facts": facts, "blocks": blocks}, ensure_ascii=False).encode() + b"\n"


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The first line, and where it ends; ValueError where it is none."""
    with open(path, "rb") as file:
        line = file.readline(_MAX_HEADER_BYTES)
    header = json.loads(line)
    if not isinstance(header, dict) or not isinstance(header.get("facts"), dict):
        raise ValueError("no header")
    return header, len(line)


def _read_part(path: pathlib.Path) -> tuple[dict[str, Any], list[int]]:
    """A part's header, and where each of its blocks starts; UserError where the part is not whole."""
    try:
        header, start = _read_header(path)
        starts = [start]
        for entry in header["blocks"]:
            starts.append(starts[-1] + entry["bytes"])
        numbers = range(header["facts"]["part"] - 1, header["facts"]["num_blocks"], header["facts"]["num_parts"])
        if starts.pop() != path.stat().st_size or [entry["number"] for entry in header["blocks"]] != list(numbers):
            raise ValueError("blocks are missing")
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; remove it and run that part again") from None
    return header, starts


def _find_parts(out: pathlib.Path) -> list[pathlib.Path]:
    """The parts beside `out`, in order; UserError where some are missing or belong to several divisions."""
    pattern = re.compile(re.escape(out.name) + r"\.part-([0-9]+)-of-([0-9]+)")
    names = [path.name for path in out.parent.iterdir()] if out.parent.is_dir() else []
    found = {(int(match[2]), int(match[1])) for match in map(pattern.fullmatch, names) if match}
    counts = sorted({count for count, _ in found})
    if not counts:
        raise UserError(f"{out}: no part lies beside it; run the same command with --part 1/n … n/n first")
    if len(counts) > 1:
        several = " and ".join(map(str, counts))
        raise UserError(f"{out}: parts of {several} lie beside it; remove those that are not meant")
    [count] = counts
    parts = [Part(number=number, count=count) for number in range(1, count + 1)]
    missing = [str(part) for part in parts if (count, part.number) not in found]
    if missing:
        shown = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
        raise UserError(f"{out}: {len(missing)} of {count} parts are missing or not finished: {shown}; run them")
    return [part.path(out) for part in parts]


def _short(value: str | int | float | None) -> str:
    return str(value)[:12]  # of a hash


def _sum_counts(entries: list[dict[str, Any]]) -> Counts:
    counts: Counts = {}
    for entry in entries:
        for name, value in entry["counts"].items():
            counts[name] = counts.get(name, 0) + value
    return counts
