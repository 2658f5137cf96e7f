"""A keyed shuffle without a table: a bijection of range(size) in O(1) memory, the same on every machine and version.

grain's own `index_shuffle` walks cycles inside a domain of at least 2^16 and so takes milliseconds an index for small
sizes (buckets of a few utterances are common on a laptop); numpy's generators promise no stable stream of permutations.
"""

import numpy as np
from jaxtyping import Integer, UInt64

_NUM_ROUNDS = 8
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = 2**64 - 1


def mix64(values: UInt64[np.ndarray, "*S"]) -> UInt64[np.ndarray, "*S"]:
    """Hashes 64-bit integers element by element (the finaliser of splitmix64: Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fold_key(*parts: int) -> int:
    """Folds integers (seed, epoch, bucket, …) into one 64-bit key; the order of the parts matters."""
    key = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix64(key * np.uint64(3) + _INCREMENT + np.uint64(part & _MASK64))
    return int(key[0])


def permute(indices: Integer[np.ndarray, "N"], size: int, key: int) -> Integer[np.ndarray, "N"]:
    """Maps each index in [0, size) to its place in the shuffle of range(size) that belongs to `key`.

    A Feistel network over the smallest near-square rectangle that holds `size` points (rows and columns are shifted in
    turn by a keyed hash of each other); the few points outside are walked on until they fall inside.
    Raises ValueError for an index outside [0, size).
    """
    indices = np.asarray(indices, np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"indices must lie in [0, {size})")
    num_rows = np.uint64(int(np.ceil(np.sqrt(size))))
    num_columns = np.uint64(-(-size // int(num_rows)))
    result = indices.astype(np.uint64)
    pending = np.arange(len(indices))
    while pending.size:
        result[pending] = _rounds(result[pending], num_rows, num_columns, key)
        pending = pending[result[pending] >= np.uint64(size)]
    return result.astype(np.int64)


def _rounds(
    points: UInt64[np.ndarray, "N"], num_rows: np.uint64, num_columns: np.uint64, key: int
) -> UInt64[np.ndarray, "N"]:
    row, column = points // num_columns, points % num_columns
    with np.errstate(over="ignore"):
        round_keys = mix64(np.uint64(key) + _INCREMENT * np.arange(1, 2 * _NUM_ROUNDS + 1, dtype=np.uint64))
    for row_key, column_key in round_keys.reshape(_NUM_ROUNDS, 2):
        row = (row + mix64(mix64(column ^ row_key) ^ column_key) % num_rows) % num_rows
        column = (column + mix64(mix64(row ^ column_key) ^ row_key) % num_columns) % num_columns
    return row * num_columns + column
