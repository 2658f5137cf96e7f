"""A batch: decoded records in arrays of one static shape per bucket."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer

from cv2jax.config import UserError
from cv2jax.data.buckets import Bucket
from cv2jax.data.shards import Record

Batch = dict[str, np.ndarray]
BatchSpec = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
EncodeText = Callable[[str], Any]  # transcript -> text token ids [T]


def batch_spec(bucket: Bucket, *, speaker: bool = False) -> BatchSpec:
    """Shape and dtype of each array in a global batch of the bucket; `speaker` where the loader is given speakers."""
    rows, integer = (bucket.batch_size,), np.dtype(np.int32)
    spec: BatchSpec = {
        "waveform": ((*rows, bucket.num_samples), np.dtype(np.int16)),
        "num_samples": (rows, integer),
        "text_tokens": ((*rows, bucket.num_text), integer),
        "num_text_tokens": (rows, integer),
        "utterance": (rows, integer),
        "row_mask": (rows, np.dtype(np.bool_)),
    }
    return spec | {"speaker": (rows, integer)} if speaker else spec


def collate(
    records: Sequence[Record],
    bucket: Bucket,
    *,
    utterances: Integer[np.ndarray, "B"],
    row_mask: Bool[np.ndarray, "B"],
    encode_text: EncodeText,
    rate_hz: int,
    speakers: Int[np.ndarray, "B"] | None = None,
) -> Batch:
    """Pads records to the bucket's lengths with zeros: `waveform` int16 [B W], `text_tokens` int32 [B T], their counts.

    `utterance` [B] is the row of the split, `row_mask` [B] False where a row only fills the shape. A record without
    text has no tokens. Raises UserError for a record that does not fit the bucket or has another rate.
    """
    spec = batch_spec(bucket, speaker=speakers is not None)
    batch = {name: np.zeros((len(records), *shape[1:]), dtype) for name, (shape, dtype) in spec.items()}
    batch["utterance"][:] = utterances
    batch["row_mask"][:] = row_mask
    if speakers is not None:
        batch["speaker"][:] = speakers
    for i, record in enumerate(records):
        place = f"utterance {record.id!r} (row {utterances[i]})"
        if record.rate_hz != rate_hz:
            raise UserError(f"{place} has {record.rate_hz} Hz, its corpus {rate_hz} Hz; prepare the corpus again")
        if len(record.waveform) > bucket.num_samples:
            raise UserError(
                f"{place} has {len(record.waveform)} samples, more than its index says; prepare the corpus again"
            )
        tokens = np.asarray(encode_text(record.text) if record.text else [], np.int32)
        if len(tokens) > bucket.num_text:
            raise UserError(
                f"{place} encodes to {len(tokens)} text tokens, its bucket holds {bucket.num_text};"
                " plan with the text lengths of this encoder"
            )
        batch["waveform"][i, : len(record.waveform)] = record.waveform
        batch["num_samples"][i] = len(record.waveform)
        batch["text_tokens"][i, : len(tokens)] = tokens
        batch["num_text_tokens"][i] = len(tokens)
    return batch


def batch_hash(batch: Batch) -> str:
    """sha256 of all arrays (names, dtypes, shapes, values): equal batches, equal hashes, on any machine."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
