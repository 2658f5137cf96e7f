"""The packing plan of the language model: several utterances to one row of fixed length, placed ahead of training.

Windows of the seed's global order are packed one by one, first-fit with the longest first, so the plan is a pure function
of (lengths, seed, options) and no host or worker has a say in it. Like the order of `plan.py` it is a memory-mapped file
that the processes of a host share; the rows are shuffled anew each epoch by a keyed bijection, so any step is direct.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt32

from cv2jax.config import UserError
from cv2jax.data.order_file import map_order, shared_file
from cv2jax.data.permutation import fold_key, permute

_VERSION = 1
_WINDOWS, _ROWS = range(2)  # what a key of the seed is for; 2 is for the coins of packed_batch.py
_CHUNK = 1 << 20  # utterances looked at together
_HEADER = 2  # uint32: number of rows, of utterances; behind them the utterances row by row, then each row's end
_TOO_LONG, _EMPTY, _NOT_KEPT = "too long", "empty", "not kept"

Masks = Mapping[str, Bool[np.ndarray, "N"]]
PackedRows = list[Int64[np.ndarray, "_"]]  # the utterances of each row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingStats:
    """What a packing plan uses, and the utterances that it leaves out by the reason for it."""

    num_utterances: int
    num_positions: int  # of the utterances
    num_rows: int
    left_out: dict[str, int]


class PackingPlan:
    """Which utterances share a row, and which rows make up the batch of any step; pickles as a path."""

    def __init__(
        self,
        *,
        seed: int,
        row_length: int,
        max_segments: int,
        batch_rows: int,
        stats: PackingStats,
        digest: str,
        path: pathlib.Path,
        packed: UInt32[np.ndarray, "_"],
    ) -> None:
        self.seed = seed
        self.row_length = row_length
        self.max_segments = max_segments
        self.batch_rows = batch_rows
        self.stats = stats
        self.hash = digest  # of all that decides the plan: equal plans give equal batches at every step
        self._path = path
        self._packed: np.ndarray | None = packed  # mapped all along, so that nobody removes the file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    @property
    def num_rows(self) -> int:
        """Packed rows in an epoch."""
        return self.stats.num_rows

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the same number on every host."""
        return -(-self.num_rows // self.batch_rows)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that an utterance takes."""
        return self.stats.num_positions / (self.num_rows * self.row_length)

    def _members(self, rows: Int64[np.ndarray, "B"]) -> PackedRows:
        if self._packed is None:
            self._packed = map_order(self._path)
        members = self._packed[_HEADER : -self.num_rows]
        ends = self._packed[-self.num_rows :]
        starts = np.where(rows > 0, ends[rows - 1], 0)
        return [members[a:b].astype(np.int64) for a, b in zip(starts.tolist(), ends[rows].tolist(), strict=True)]

    def batch(self, step: int) -> tuple[int, PackedRows]:
        """Epoch and the utterances of each of the `batch_rows` rows, for any step ≥ 0.

        The rows are shuffled anew each epoch, whose last batch is filled up with its first rows.
        """
        if step < 0:
            raise ValueError(f"step {step}: must be 0 or more")
        epoch, number = divmod(step, self.num_batches)
        places = (number * self.batch_rows + np.arange(self.batch_rows)) % self.num_rows
        return epoch, self._members(permute(places, self.num_rows, fold_key(self.seed, _ROWS, epoch)))

    def evaluation_batch(self, index: int) -> tuple[PackedRows, Bool[np.ndarray, "B"]]:
        """Rows and row mask of one of the `num_batches` batches that show every utterance once, in the plan's order.

        The last batch is filled up with rows that hold no utterance, masked out.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"evaluation batch {index} of {self.num_batches}")
        rows = np.arange(index * self.batch_rows, (index + 1) * self.batch_rows)
        row_mask = rows < self.num_rows
        members = self._members(rows[row_mask])
        return members + [np.zeros(0, np.int64)] * (self.batch_rows - len(members)), row_mask

    def evaluation_batches(self) -> Iterator[tuple[PackedRows, Bool[np.ndarray, "B"]]]:
        """All evaluation batches in order."""
        return (self.evaluation_batch(index) for index in range(self.num_batches))

    def table(self) -> str:
        """The plan for people, in two lines."""
        stats, rows = self.stats, f"{self.num_rows} rows of {self.row_length} positions"
        return (
            f"{stats.num_utterances} utterances in {rows} ({stats.num_utterances / self.num_rows:.1f} a row, at most"
            f" {self.max_segments}), {self.fill:.1%} filled; left out: {_list_counts(stats.left_out)}\n"
            f"{self.num_batches} batches of {self.batch_rows} rows, {-self.num_rows % self.batch_rows} rows repeated in"
            " an epoch"
        )


def make_packing(
    lengths: Integer[np.ndarray, "N"],
    *,
    row_length: int = 2048,
    max_segments: int,
    batch_rows: int,
    seed: int,
    window: int = 2048,
    keep: Bool[np.ndarray, "N"] | Masks | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    name: str = "",
) -> PackingPlan:
    """Packs utterances of `lengths` positions each (memory-mapped, of any size) into rows of `row_length` positions.

    A row holds at most `max_segments` utterances, all from one window of `window` utterances of the seed's order.
    Utterances that do not fit a row are left out and counted, as are those that `keep` is False for: one mask, or masks
    by the reason that the counts give ("without text"). The plan's file goes where `make_plan` puts its own. Raises
    UserError (which says `name`, that of the split) where no utterance is left and where the file cannot be written.
    """
    for option, value in {
        "row length": row_length,
        "cap on utterances in a row": max_segments,
        "rows in a batch": batch_rows,
        "window of utterances": window,
    }.items():
        if value < 1:
            raise UserError(f"{option} {value}: must be 1 or more")
    masks = keep if isinstance(keep, Mapping) else {} if keep is None else {_NOT_KEPT: keep}
    columns = _Columns(lengths, masks, row_length)
    digest = hashlib.sha256(f"packing {_VERSION} {seed} {row_length} {max_segments} {window} {len(lengths)}".encode())
    num_utterances, num_positions, left_out = columns.survey(digest)
    if not num_utterances:
        split = f"split {name}: " if name else ""
        raise UserError(
            f"{split}no utterance of {len(lengths)} is left to pack in rows of {row_length} ({_list_counts(left_out)});"
            " raise the row length, or give a split with text and speech"
        )

    def write(file: io.BufferedWriter) -> None:
        windows = _windows(columns, window, fold_key(seed, _WINDOWS))
        _write_packing(file, windows, num_utterances, row_length, max_segments)

    path, packed = shared_file(
        digest.hexdigest(),
        write,
        lambda path: _is_whole(path, num_utterances),
        cache_dir,
        what="packing plan",
        size=f"up to {8 * num_utterances / 2**20:.1f} MiB",
    )
    digest.update(f" {batch_rows}".encode())
    return PackingPlan(
        seed=seed,
        row_length=row_length,
        max_segments=max_segments,
        batch_rows=batch_rows,
        stats=PackingStats(
            num_utterances=num_utterances, num_positions=num_positions, num_rows=int(packed[0]), left_out=left_out
        ),
        digest=digest.hexdigest(),
        path=path,
        packed=packed,
    )


class _Columns:
    """The lengths of a split, 0 for what is left out."""

    def __init__(self, lengths: np.ndarray, masks: Masks, row_length: int) -> None:
        for reason, mask in masks.items():
            if len(mask) != len(lengths):
                raise ValueError(f"{len(lengths)} lengths but {len(mask)} in the mask of those {reason}")
        self.lengths, self.masks, self.row_length = lengths, masks, row_length

    def sizes(self, where: slice | np.ndarray) -> np.ndarray:
        """int32: the lengths at `where`, 0 for what is left out."""
        lengths = self.lengths[where]
        kept = (lengths > 0) & (lengths <= self.row_length)
        for mask in self.masks.values():
            kept &= mask[where]
        return np.where(kept, lengths, 0).astype(np.int32)

    def survey(self, digest: Any) -> tuple[int, int, dict[str, int]]:
        """Utterances and positions that are kept, what is not by the first reason for it; feeds the sizes to `digest`."""
        num_utterances = num_positions = 0
        left_out = dict.fromkeys((*self.masks, _EMPTY, _TOO_LONG), 0)
        for start in range(0, len(self.lengths), _CHUNK):
            where = slice(start, start + _CHUNK)
            lengths, sizes = self.lengths[where], self.sizes(where)
            digest.update(sizes.tobytes())
            num_utterances += int(np.count_nonzero(sizes))
            num_positions += int(sizes.sum(dtype=np.int64))
            tests = {reason: mask[where] for reason, mask in self.masks.items()}
            unexplained = sizes == 0
            for reason, kept in (tests | {_EMPTY: lengths > 0, _TOO_LONG: lengths <= self.row_length}).items():
                left_out[reason] += int(np.count_nonzero(unexplained & ~kept))
                unexplained &= kept
        return num_utterances, num_positions, left_out


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _is_whole(path: pathlib.Path, num_utterances: int) -> bool:
    header = np.fromfile(path, np.uint32, _HEADER)
    return header.tolist()[1:] == [num_utterances] and path.stat().st_size == 4 * (_HEADER + int(header.sum()))


def _write_packing(
    file: io.BufferedWriter,
    windows: Iterator[tuple[np.ndarray, np.ndarray]],
    num_utterances: int,
    row_length: int,
    max_segments: int,
) -> None:
    """Header, utterances row by row, ends; in memory are a chunk of windows, and four bytes a row."""
    file.write(bytes(4 * _HEADER))
    num_segments = []
    for indices, sizes in windows:
        members, counts = _pack_windows(indices, sizes, row_length, max_segments)
        file.write(members.astype(np.uint32).tobytes())
        num_segments.append(counts.astype(np.uint32))
    ends = np.cumsum(np.concatenate(num_segments), dtype=np.uint32)
    file.write(ends.tobytes())
    file.seek(0)
    file.write(np.array([len(ends), num_utterances], np.uint32).tobytes())


def _windows(columns: _Columns, window: int, key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and sizes [windows, utterances] of what is kept, in the key's order; the last window may be shorter."""
    size = len(columns.lengths)
    indices, sizes = np.zeros(0, np.int64), np.zeros(0, np.int32)
    for start in range(0, size, _CHUNK):
        drawn = permute(np.arange(start, min(start + _CHUNK, size)), size, key)
        drawn_sizes = columns.sizes(drawn)
        kept = drawn_sizes > 0
        indices, sizes = np.concatenate([indices, drawn[kept]]), np.concatenate([sizes, drawn_sizes[kept]])
        whole = len(indices) // window * window
        if whole:
            yield indices[:whole].reshape(-1, window), sizes[:whole].reshape(-1, window)
        indices, sizes = indices[whole:], sizes[whole:]
    if len(indices):
        yield indices[None], sizes[None]


def _pack_windows(
    indices: np.ndarray, sizes: np.ndarray, row_length: int, max_segments: int
) -> tuple[np.ndarray, np.ndarray]:
    """First-fit, longest first, in all windows [W K] at once: members row by row, and the utterances of each row."""
    num_windows, num_items = sizes.shape
    dtype = np.int16 if row_length < 2**15 else np.int32
    by_size = np.argsort((-sizes).astype(dtype), axis=1, kind="stable")
    steps = np.ascontiguousarray(np.take_along_axis(sizes, by_size, 1).astype(dtype).T)
    row_of = np.empty((num_items, num_windows), np.int32)
    each = np.arange(num_windows)
    room = np.full((num_windows, 64), row_length, dtype)
    count = np.zeros(room.shape, np.int32)
    num_open = 0
    for size, row in zip(steps, row_of, strict=True):
        if num_open == room.shape[1]:
            room = np.concatenate([room, np.full(room.shape, row_length, dtype)], 1)
            count = np.concatenate([count, np.zeros(count.shape, np.int32)], 1)
        # An untouched row has room for anything, so one of them ends every search.
        row[:] = (room[:, : num_open + 1] >= size[:, None]).argmax(1)
        count[each, row] += 1
        left = room[each, row] - size
        room[each, row] = np.where(count[each, row] < max_segments, left, 0)
        num_open = max(num_open, int(row.max()) + 1)
    by_row = np.argsort(row_of.T, axis=1, kind="stable")
    members = np.take_along_axis(indices, np.take_along_axis(by_size, by_row, 1), 1)
    return members.ravel(), count[count > 0]
