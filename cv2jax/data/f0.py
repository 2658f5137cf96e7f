"""The F0 that `cv2jax f0` wrote beside a prepared corpus, by row of a split."""

import json
import os
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from cv2jax.audio.mel import MEL_HOP
from cv2jax.config import UserError
from cv2jax.data.f0_shard import F0_DIRECTORY, F0_DTYPE, F0_VERSION, INDEX
from cv2jax.data.shards import Corpus


class F0File:
    """F0 of the rows of one split: memory-mapped a row at a time, so picklable and safe to share among threads.

    `method` is the tracker, `hash` that of everything the values depend on. Raises UserError where the corpus has no F0,
    that of other audio or of another hop, or where a file is missing or cut short.
    """

    def __init__(self, corpus: str | os.PathLike[str] | Corpus, split: str) -> None:
        opened = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        self.path, self.split = opened.path / F0_DIRECTORY, split
        self._mend = f"run `cv2jax f0 {opened.path}`"
        self._num_samples = opened.split(split).num_samples
        index = self._load_index(opened)
        self.method, self.hash = str(index["method"]), str(index["hash"])
        self.hop_length = MEL_HOP
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        self._files = [str(shard["file"]) for shard in shards]
        self._last_row = np.cumsum([shard["num_records"] for shard in shards])
        self._rows: np.ndarray | None = None
        self._check_sizes(shards)

    def _load_index(self, corpus: Corpus) -> dict[str, Any]:
        path = self.path / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            found = (index["version"], index["corpus"], index["hop_length"])
            for shard in index["shards"]:
                for name in ("split", "file", "num_records", "bytes"):
                    shard[name]
            index["method"], index["hash"]
        except OSError:
            raise UserError(f"{corpus.path}: has no F0 yet (no {path}); {self._mend}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error!r}); {self._mend}") from None
        if found[0] != F0_VERSION or found[2] != MEL_HOP:
            what = f"format {found[0]}, hop {found[2]}; this is {F0_VERSION}, {MEL_HOP}"
            raise UserError(f"{path}: {what}; remove {self.path} and {self._mend}")
        if found[1] != corpus.hash:
            raise UserError(f"{path}: is of corpus {found[1][:12]}, this one is {corpus.hash[:12]}; {self._mend}")
        return index

    def _check_sizes(self, shards: list[dict[str, Any]]) -> None:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.path)}
        for shard in shards:
            size = sizes.get(shard["file"])
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} of {shard['bytes']} bytes"
                raise UserError(f"{self.path / shard['file']}: {state}; {self._mend}")

    def __len__(self) -> int:
        return len(self._num_samples) if self._rows is None else len(self._rows)

    def take(self, rows: Integer[np.ndarray, "_"]) -> "F0File":
        """The same F0 whose row i is row `rows[i]` of this one, as `SplitSubset` has it."""
        taken = object.__new__(F0File)
        taken.__dict__.update(self.__dict__)
        taken._rows = rows if self._rows is None else self._rows[rows]
        return taken

    def read(self, row: int) -> Float32[np.ndarray, " F"]:
        """F0 `[F]` in Hz of one row, 0 where unvoiced, F = num_samples // 480; UserError where its file is damaged."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of the F0 of split {self.split!r} with {len(self)} rows")
        row = row if self._rows is None else int(self._rows[row])
        shard = int(np.searchsorted(self._last_row, row, side="right"))
        first = int(self._last_row[shard - 1]) if shard else 0
        before = self._num_samples[first:row] // self.hop_length
        count = int(self._num_samples[row]) // self.hop_length
        path = self.path / self._files[shard]
        if not count:
            return np.zeros(0, np.float32)
        try:
            offset = int(before.sum(dtype=np.int64)) * F0_DTYPE.itemsize
            return np.array(np.memmap(path, F0_DTYPE, "r", offset, (count,)), np.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {self._mend}") from None
