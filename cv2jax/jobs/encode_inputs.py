"""The inputs of `cv2jax encode`, in order and in blocks of rows, loaded by threads a few ahead of the device."""

import dataclasses
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32

from cv2jax.audio.io import load_waveform
from cv2jax.audio.mel import WHISPER_HOP, WHISPER_RATE_HZ
from cv2jax.config import UserError
from cv2jax.data.manifest import ManifestScan, parse_utterance, scan_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An input to load; or, with a reason, one that is refused already."""

    id: str
    audio: str  # as the user wrote it
    path: str
    block: int
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """An input and its audio at 16 kHz."""

    source: Source
    waveform: Float32[np.ndarray, " W"]

    @property
    def block(self) -> int:
        """The block of its row."""
        return self.source.block


class Inputs:
    """Audio files and manifests (.jsonl), which are checked now, so that a wrong one stops the job before it starts.

    Rows, which are files and good lines, make blocks of `block_rows` in their order; `split` keeps one split of the
    manifests.
    """

    def __init__(self, names: Sequence[str], split: str | None, block_rows: int) -> None:
        self._names, self._split, self._block_rows = names, split, block_rows
        self._scans = {path: scan_manifest(path) for path in names if path.endswith(".jsonl")}
        if split is not None and not any(split in scan.splits for scan in self._scans.values()):
            known = sorted({name for scan in self._scans.values() for name in scan.splits})
            hint = f"the manifests have {', '.join(known)}" if known else "only manifests have splits"
            raise UserError(f"split={split}: no input has that split; {hint}")

    @property
    def num_blocks(self) -> int:
        """Blocks of the one manifest."""
        return -(-len(self._rows(self._scans[self._names[0]])) // self._block_rows)

    def bad_lines(self) -> Iterator[Source]:
        """What the manifests hold that is no utterance."""
        for name, scan in self._scans.items():
            for bad in scan.refused:
                yield Source(id=bad.id or "", audio="", path="", block=0, reason=f"{name}:{bad.line}: {bad.reason}")

    def read(self) -> Iterator[Source]:
        """Every file and every good line."""
        # One manifest has unique ids already: nothing need be remembered, however long it is.
        seen: dict[str, int] | None = {} if len(self._names) > 1 else None
        count = 0
        for number, name in enumerate(self._names):
            for source in self._read_rows(name) if name in self._scans else [_file_source(name)]:
                reason = None
                if seen is not None and (first := seen.setdefault(source.id, number)) != number:
                    reason = f'duplicate id "{source.id}" (first in {self._names[first]})'
                yield dataclasses.replace(source, block=count // self._block_rows, reason=reason)
                count += reason is None

    def read_blocks(self, numbers: Sequence[int]) -> Iterator[Source]:
        """The good lines of some blocks of the one manifest."""
        [name] = self._names
        rows = self._rows(self._scans[name])
        for number in numbers:
            first = number * self._block_rows
            for source in self._read_rows(name, rows[first : first + self._block_rows]):
                yield dataclasses.replace(source, block=number)

    def _rows(self, scan: ManifestScan) -> np.ndarray:
        if self._split is None:
            return np.arange(len(scan.line))
        return scan.rows(self._split) if self._split in scan.splits else np.zeros(0, np.int64)

    def _read_rows(self, name: str, rows: np.ndarray | None = None) -> Iterator[Source]:
        scan, directory = self._scans[name], os.path.dirname(os.path.abspath(name))
        with open(scan.path, "rb") as file:
            for row in self._rows(scan) if rows is None else rows:
                file.seek(int(scan.offset[row]))
                utterance = parse_utterance(file.readline())
                path = os.path.join(directory, utterance.audio)
                yield Source(id=utterance.id, audio=utterance.audio, path=path, block=0)


def load_all(sources: Iterator[Source], workers: int, reserved: str | None) -> Generator[Loaded | Source]:
    """Loads a few inputs ahead in threads, in order; what is refused comes back with the reason, so does the id `reserved`."""
    waiting: deque[Future[Loaded | Source]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for source in sources:
            waiting.append(pool.submit(_load, source, reserved))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _file_source(name: str) -> Source:
    return Source(id=name, audio=name, path=name, block=0)


def _load(source: Source, reserved: str | None) -> Loaded | Source:
    if source.reason is not None:
        return source
    if source.id == reserved:
        return dataclasses.replace(source, reason=f'id "{reserved}" is taken in an npz; write .jsonl')
    try:
        waveform = load_waveform(source.path, WHISPER_RATE_HZ)
    except UserError as error:
        return dataclasses.replace(source, reason=str(error))
    if len(waveform) < WHISPER_HOP:
        return dataclasses.replace(source, reason=f"{source.path}: lasts under 10 ms, which gives no token")
    return Loaded(source=source, waveform=waveform)
