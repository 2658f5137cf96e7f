"""A batch: decoded records in arrays of one static shape per bucket."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Integer

from cv2jax.audio.mel import MEL_HOP
from cv2jax.config import UserError
from cv2jax.data.buckets import Bucket
from cv2jax.data.order_file import SPEECH_TOKENS_PER_SECOND
from cv2jax.data.shards import Record

Batch = dict[str, np.ndarray]
BatchSpec = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
EncodeText = Callable[[str], Any]  # transcript -> text token ids [T]
TOKEN_RATE_HZ = SPEECH_TOKENS_PER_SECOND
_MORE_TOKENS = 2  # than the audio is long, which other front ends make by padding it


def num_token_slots(num_samples: int, rate_hz: int) -> int:
    """Speech tokens of a row of `num_samples` samples, the last one begun."""
    return -(-num_samples * TOKEN_RATE_HZ // rate_hz)


def batch_spec(
    bucket: Bucket,
    *,
    text: bool = True,
    speaker: bool = False,
    speech_tokens: int | None = None,
    f0: bool = False,
    speaker_embedding: int | None = None,
) -> BatchSpec:
    """Shape and dtype of each array in a global batch of the bucket.

    `text`, `speaker`, `f0`: whether the loader encodes texts, is given speakers, F0. `speech_tokens`: how many a row has,
    if any. `speaker_embedding`: its size, if any.
    """
    rows, integer = (bucket.batch_size,), np.dtype(np.int32)
    spec: BatchSpec = {
        "waveform": ((*rows, bucket.num_samples), np.dtype(np.int16)),
        "num_samples": (rows, integer),
        "utterance": (rows, integer),
        "row_mask": (rows, np.dtype(np.bool_)),
    }
    if text:
        spec |= {"text_tokens": ((*rows, bucket.num_text), integer), "num_text_tokens": (rows, integer)}
    if speech_tokens is not None:
        spec |= {"speech_tokens": ((*rows, speech_tokens), integer), "num_speech_tokens": (rows, integer)}
    if f0:
        spec |= {"f0": ((*rows, -(-bucket.num_samples // MEL_HOP)), np.dtype(np.float32))}
    if speaker_embedding is not None:
        spec |= {"speaker_embedding": ((*rows, speaker_embedding), np.dtype(np.float32))}
    return spec | {"speaker": (rows, integer)} if speaker else spec


def collate(
    records: Sequence[Record],
    bucket: Bucket,
    *,
    utterances: Integer[np.ndarray, "B"],
    row_mask: Bool[np.ndarray, "B"],
    encode_text: EncodeText | None,
    rate_hz: int,
    speakers: Int[np.ndarray, "B"] | None = None,
    speech_tokens: Sequence[Int[np.ndarray, " _"]] | None = None,
    f0: Sequence[Float32[np.ndarray, " _"]] | None = None,
    speaker_embeddings: Float32[np.ndarray, "B E"] | None = None,
) -> Batch:
    """Pads records to the bucket's lengths with zeros: `waveform` int16 [B W], `text_tokens` int32 [B T], their counts.

    `utterance` [B] is the row of the split, `row_mask` [B] False where a row only fills the shape. A record without
    text has no tokens; without `encode_text` there are none at all. `speech_tokens` [B L] are those of each record; one
    that has none is no row. `f0` [B F] is that of each record, in Hz, `speaker_embeddings` [B E] the batch's
    `speaker_embedding`. Raises UserError for a record that does not fit the bucket or has another rate.
    """
    slots = None if speech_tokens is None else num_token_slots(bucket.num_samples, rate_hz)
    has = {"text": encode_text is not None, "speaker": speakers is not None, "f0": f0 is not None}
    size = None if speaker_embeddings is None else speaker_embeddings.shape[1]
    spec = batch_spec(bucket, **has, speech_tokens=slots, speaker_embedding=size)
    batch = {name: np.zeros((len(records), *shape[1:]), dtype) for name, (shape, dtype) in spec.items()}
    batch["utterance"][:] = utterances
    batch["row_mask"][:] = row_mask
    if speakers is not None:
        batch["speaker"][:] = speakers
    if speaker_embeddings is not None:
        batch["speaker_embedding"][:] = speaker_embeddings
    for i, record in enumerate(records):
        place = f"utterance {record.id!r} (row {utterances[i]})"
        if record.rate_hz != rate_hz:
            raise UserError(f"{place} has {record.rate_hz} Hz, its corpus {rate_hz} Hz; prepare the corpus again")
        if len(record.waveform) > bucket.num_samples:
            raise UserError(
                f"{place} has {len(record.waveform)} samples, more than its index says; prepare the corpus again"
            )
        batch["waveform"][i, : len(record.waveform)] = record.waveform
        batch["num_samples"][i] = len(record.waveform)
        if encode_text is not None:
            tokens = np.asarray(encode_text(record.text) if record.text else [], np.int32)
            if len(tokens) > bucket.num_text:
                raise UserError(
                    f"{place} encodes to {len(tokens)} text tokens, its bucket holds {bucket.num_text};"
                    " plan with the text lengths of this encoder"
                )
            _put(batch, "text_tokens", i, tokens)
        if speech_tokens is not None:
            _put(batch, "speech_tokens", i, _fitting(speech_tokens[i], len(record.waveform), rate_hz, place))
            batch["row_mask"][i] &= len(speech_tokens[i]) > 0
        if f0 is not None:
            batch["f0"][i, : len(f0[i])] = f0[i]
    return batch


def _put(batch: Batch, name: str, row: int, tokens: Int[np.ndarray, " _"]) -> None:
    batch[name][row, : len(tokens)] = tokens
    batch[f"num_{name}"][row] = len(tokens)


def _fitting(tokens: Int[np.ndarray, " _"], num_samples: int, rate_hz: int, place: str) -> Int[np.ndarray, " _"]:
    slots = num_token_slots(num_samples, rate_hz)
    if len(tokens) > slots + _MORE_TOKENS:
        raise UserError(
            f"{place} has {len(tokens)} speech tokens for {num_samples / rate_hz:.2f} s of audio, which are {slots};"
            " encode the manifest that the corpus was prepared from"
        )
    return tokens[:slots]


def batch_hash(batch: Batch) -> str:
    """sha256 of all arrays (names, dtypes, shapes, values): equal batches, equal hashes, on any machine."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
