"""From the length columns of a split to the order file: its rows sorted by length bucket, four bytes each.

Every pass reads the memory-mapped columns in chunks, so that memory does not grow with the corpus. The file lies on the
host and not beside the run: processes map it, and a mapping of a file that another host replaces is a crash.
"""

import contextlib
import dataclasses
import errno
import fcntl
import io
import os
import pathlib
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt32

from cv2jax.config import UserError
from cv2jax.data.buckets import Bucket

SPEECH_TOKENS_PER_SECOND = 25  # bucket lengths are whole speech tokens (40 ms)
LEFT_OUT = 255  # bucket id of a row that is in no bucket
_CHUNK = 1 << 21  # rows read at a time
_KEPT_ORDERS = 8
_KEPT_SECONDS = 30 * 86400.0
_UNFINISHED_SECONDS = 86400.0  # no order takes a day to write


@runtime_checkable
class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Chunk(NamedTuple):
    start: int  # row of the first element
    samples: np.ndarray
    text: np.ndarray
    bins: np.ndarray  # length in whole speech tokens, rounded up; 0 where left out
    reason: np.ndarray  # 0 kept, 1 too short, 2 too long, 3 without text, 4 too much text


class LengthColumns:
    """The two length columns of a split in chunks, with each row's bin or the reason why it is left out."""

    def __init__(
        self,
        num_samples: Integer[np.ndarray, "N"],
        text_lengths: Integer[np.ndarray, "N"],
        *,
        rate_hz: int,
        min_seconds: float,
        max_seconds: float,
        max_characters_per_second: float,
        require_text: bool,
    ) -> None:
        self._columns = num_samples, text_lengths
        self._rate_hz, self._max_characters = rate_hz, max_characters_per_second
        self._min_samples = max(1, int(np.ceil(min_seconds * rate_hz)))
        self._max_samples = int(max_seconds * rate_hz)
        self._require_text = require_text
        self.bin_samples = rate_hz // SPEECH_TOKENS_PER_SECOND
        self.num_bins = 1 + -(-max(self._max_samples, 0) // self.bin_samples)

    def __iter__(self) -> Iterator[_Chunk]:
        for start in range(0, len(self._columns[0]), _CHUNK):
            samples, text = (np.asarray(column[start : start + _CHUNK]) for column in self._columns)
            reason = (samples < self._min_samples) + np.uint8(2) * (samples > self._max_samples)
            if self._require_text:
                reason = np.where((reason == 0) & (text <= 0), np.uint8(3), reason)
            # One such text would set the shape of its whole bucket, and with it the memory of a step.
            crowded = text > self._max_characters / self._rate_hz * np.maximum(samples, self._rate_hz)
            reason = np.where((reason == 0) & crowded, np.uint8(4), reason)
            yield _Chunk(start, samples, text, np.where(reason == 0, -(-samples // self.bin_samples), 0), reason)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """How many rows are in no bucket, and why."""

    num_too_short: int
    num_too_long: int
    num_without_text: int
    num_with_too_much_text: int

    def __str__(self) -> str:
        return (
            f"left out: {self.num_too_short} too short, {self.num_too_long} too long,"
            f" {self.num_without_text} without text, {self.num_with_too_much_text} with too much text"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """Exact histogram of the lengths that are kept, the longest text of each bin, and what is left out."""

    num_utterances: Int64[np.ndarray, "bins"]
    max_text: Int64[np.ndarray, "bins"]
    num_samples: int
    left_out: LeftOut


def survey_lengths(columns: LengthColumns) -> Survey:
    """Reads the columns once, chunk by chunk."""
    num_utterances, max_text = np.zeros((2, columns.num_bins), np.int64)
    reasons, num_samples = np.zeros(5, np.int64), 0
    for chunk in columns:
        kept = chunk.reason == 0
        num_utterances += np.bincount(chunk.bins[kept], minlength=columns.num_bins)
        np.maximum.at(max_text, chunk.bins, chunk.text)  # bin 0 gathers what is left out; nobody asks for it
        reasons += np.bincount(chunk.reason, minlength=5)
        num_samples += int(chunk.samples[kept].sum(dtype=np.int64))
    left_out = LeftOut(*reasons[1:].tolist())
    return Survey(num_utterances=num_utterances, max_text=max_text, num_samples=num_samples, left_out=left_out)


def shared_order(
    columns: LengthColumns,
    bucket_of_bin: UInt8[np.ndarray, "bins"],
    buckets: tuple[Bucket, ...],
    digest: _Digest,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[pathlib.Path, UInt32[np.ndarray, "N"]]:
    """Feeds each row's bucket to `digest`; returns the file of the rows sorted by bucket, and its mapping.

    See `shared_file` for where it lies; UserError where it cannot be written.
    """
    for chunk in columns:
        digest.update(bucket_of_bin[chunk.bins].tobytes())
    num_bytes = 4 * sum(bucket.num_utterances for bucket in buckets)
    return shared_file(
        digest.hexdigest(),
        lambda file: _sort_rows(file, columns, bucket_of_bin, buckets),
        lambda path: path.stat().st_size == num_bytes,
        cache_dir,
        what="data order",
        size=f"{num_bytes / 2**20:.1f} MiB",
    )


def shared_file(
    digest: str,
    write: Callable[[io.BufferedWriter], None],
    is_whole: Callable[[pathlib.Path], bool],
    cache_dir: str | os.PathLike[str] | None,
    *,
    what: str,
    size: str,
) -> tuple[pathlib.Path, UInt32[np.ndarray, "N"]]:
    """The file that `digest` names, filled by `write` if it is not there or not `is_whole`, and its mapping.

    The digest decides the content, so whoever comes to the same one shares the file: it is written once and never
    replaced, as others may have it mapped. It lies in `cache_dir`, or in a directory of this user on this host, which
    forgets the files that were not used lately. Raises UserError, which says `what` it is and its `size`, where it
    cannot be written.
    """
    place = cache_dir
    try:
        place = cache_dir or pathlib.Path(tempfile.gettempdir()) / f"cv2jax-{os.getuid()}"
        directory = _open_directory(pathlib.Path(place), private=cache_dir is None)
        path = directory / f"order-{digest[:32]}.u32"
        with _locked(directory / "lock"):  # of several processes that start together one writes, the others wait
            if not _passes(path, is_whole):
                path.unlink(missing_ok=True)
                if cache_dir is None:
                    _forget_old(directory)
                with _appearing_at(path) as file:
                    write(file)
            os.utime(path)
            return path, map_order(path)
    except OSError as error:
        mend = "free it or name another" if cache_dir else "free it, or let TMPDIR name another directory"
        where = place or "temporary directory"
        raise UserError(
            f"{where}: cannot write the {what} ({error.strerror or error}; it takes {size}): {mend}"
        ) from None


def map_order(path: pathlib.Path) -> UInt32[np.ndarray, "N"]:
    """The order file, mapped, and not forgotten while it is: the mapping keeps the file's descriptor, thus the lock."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return np.memmap(file, np.uint32, mode="r")


def _open_directory(directory: pathlib.Path, *, private: bool) -> pathlib.Path:
    directory.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    if private:
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "not a directory of this user")
        directory.chmod(0o700)
    return directory


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("ab") as file:
        with contextlib.suppress(OSError):  # without locks equal files may be written at once: the first one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _appearing_at(path: pathlib.Path) -> Iterator[io.BufferedWriter]:
    """A file to write that takes its name when it is whole, unless another has taken it by then."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix="order-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)  # a later process takes the name and the size for the proof that the file is whole
        try:
            os.link(unfinished, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links on a mounted bucket
            os.rename(unfinished, path)
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)


def _forget_old(directory: pathlib.Path) -> None:
    """Removes what a killed process left unfinished, and the orders that nobody maps and nobody used lately."""
    now = time.time()
    used = {path: path.stat().st_mtime for path in directory.glob("order-*")}
    orders = sorted((path for path in used if path.suffix == ".u32"), key=used.__getitem__, reverse=True)
    for path in used.keys() - orders:
        if now - used[path] > _UNFINISHED_SECONDS:
            path.unlink()
    for i, path in enumerate(orders, 1):  # the one about to be written counts
        if i < _KEPT_ORDERS and now - used[path] < _KEPT_SECONDS:
            continue
        with path.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _passes(path: pathlib.Path, is_whole: Callable[[pathlib.Path], bool]) -> bool:
    try:
        return is_whole(path)
    except FileNotFoundError:
        return False


def _sort_rows(
    file: io.BufferedWriter,
    columns: LengthColumns,
    bucket_of_bin: UInt8[np.ndarray, "bins"],
    buckets: tuple[Bucket, ...],
) -> None:
    """Counting sort through seek and write: dirty pages of a mapping would count as resident memory."""
    cursors = np.cumsum([0, *(bucket.num_utterances for bucket in buckets)])[:-1]
    for chunk in columns:
        bucket_ids = bucket_of_bin[chunk.bins]
        order = np.argsort(bucket_ids, kind="stable")  # a radix sort for one byte
        ends = np.cumsum(np.bincount(bucket_ids, minlength=len(buckets))[: len(buckets)])
        for bucket_id, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            file.seek(int(cursors[bucket_id]) * 4)
            file.write((order[first:end] + chunk.start).astype(np.uint32).tobytes())
            cursors[bucket_id] += end - first
