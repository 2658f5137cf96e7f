"""A few rows of a split that look like a split."""

import numpy as np

from cv2jax.data.shards import Record, Split


class SplitSubset:
    """Rows of a split in the order given, with the columns a plan needs; picklable."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        self._split, self._rows = split, rows
        self.name = split.name
        self.num_samples = np.asarray(split.num_samples[rows])
        self.num_characters = np.asarray(split.num_characters[rows])
        self.speaker = np.asarray(split.speaker[rows])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Record:
        """The record of the subset's row; UserError as `Split.read`."""
        return self._split.read(int(self._rows[row]))


def spread_rows(count: int, limit: int) -> np.ndarray:
    """`limit` rows spread evenly over 0 … count - 1 (all of them for limit 0 or limit ≥ count), ascending."""
    if limit <= 0 or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit
