"""Batches from a split and its plan, decoded by grain's threads and worker processes.

The grain source's element i *is* the local batch of global step `start_step + i`: the plan alone decides what it holds.
So the step is the only state, and neither the number of workers nor that of hosts changes a batch (grain's own
iterator state is tied to both).
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Bool, Float32, Int64

from cv2jax.config import DataConfig, UserError
from cv2jax.data.batch import Batch, EncodeText, batch_spec, collate, num_token_slots
from cv2jax.data.buckets import Bucket
from cv2jax.data.f0 import F0File
from cv2jax.data.plan import Plan
from cv2jax.data.shards import Record
from cv2jax.data.speaker_vectors import SpeakerVectors
from cv2jax.data.tokens import SpeechTokenFile

SelectRows = Callable[[int], Any]  # global batch size -> rows of it [B] that this process loads
_ENDLESS = 1 << 40  # steps of a loader without an end
# Batches of a worker on their way: in its hands, in its queue, in the hands of the thread that empties it, and ready.
_HANDED_OVER = 4
_NAMED_MISSING = 5  # without speech tokens, and without embeddings, that a process names


@runtime_checkable
class ReadsRows(Protocol):
    """What the loader needs of a split (`shards.Split`): its size and each row's record; `speaker` too where that is wanted."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Record:
        """The record of one row."""
        ...


@runtime_checkable
class BatchSource(Protocol):
    """Random access to local batches, (step, batch) at each index; picklable, so that each worker opens its own readers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Batch]: ...


class _BatchSource:
    """Local batches of audio."""

    def __init__(
        self,
        split: ReadsRows,
        plan: Plan,
        encode_text: EncodeText | None,
        rows: SelectRows | None,
        speaker: bool,
        tokens: SpeechTokenFile | None,
        f0: F0File | None,
        embeddings: SpeakerVectors | None,
    ) -> None:
        self._split: Any = split
        self._plan = plan
        self._encode_text = encode_text
        self._rows = rows
        self._speaker = speaker
        self._tokens = tokens
        self._f0 = f0
        self._embeddings = embeddings
        self._named: dict[str, set[str]] = {}  # what is missing → of whom

    def _load(
        self, step: int, bucket_id: int, utterances: Int64[np.ndarray, "B"], row_mask: Bool[np.ndarray, "B"]
    ) -> tuple[np.ndarray, Batch]:
        if self._rows is not None:
            local = np.asarray(self._rows(len(utterances)), np.int64)
            utterances, row_mask = utterances[local], row_mask[local]
        records = [self._read(row) for row in utterances.tolist()]
        vectors = None
        if self._embeddings is not None:
            vectors, has_vector = self._embed(self._embeddings, records)
            row_mask = row_mask & has_vector
        batch = collate(
            records,
            self._plan.buckets[bucket_id],
            utterances=utterances,
            row_mask=row_mask,
            encode_text=self._encode_text,
            rate_hz=self._plan.rate_hz,
            speakers=np.asarray(self._split.speaker[utterances], np.int32) if self._speaker else None,
            speech_tokens=None if self._tokens is None else [self._find(self._tokens, r.id) for r in records],
            f0=None if self._f0 is None else [self._f0.read(row) for row in utterances.tolist()],
            speaker_embeddings=vectors,
        )
        return np.array(step, np.int64), batch

    def _find(self, tokens: SpeechTokenFile, identity: str) -> np.ndarray:
        try:
            found = tokens.read(identity)
        except KeyError:
            found = np.zeros(0, np.int32)
        if not len(found):
            self._name_missing("tokens", "utterance", identity, tokens.path)
        return found

    def _embed(
        self, embeddings: SpeakerVectors, records: list[Record]
    ) -> tuple[Float32[np.ndarray, "B E"], Bool[np.ndarray, "B"]]:
        """(vector of each record, zeros for one that has none; whether it has one)."""
        vectors, has = np.zeros((len(records), embeddings.dim), np.float32), np.zeros(len(records), np.bool_)
        for i, record in enumerate(records):
            found = embeddings.find(record)
            if found is None:
                self._name_missing("embedding", embeddings.of, embeddings.name(record), embeddings.path)
            else:
                vectors[i], has[i] = found, True
        return vectors, has

    def _name_missing(self, what: str, whose: str, name: str, path: pathlib.Path) -> None:
        named = self._named.setdefault(what, set())
        if name not in named and len(named) < _NAMED_MISSING:
            named.add(name)
            more = "; others like it are not named" if len(named) == _NAMED_MISSING else ""
            logging.warning("%s %r is left out: %s has no %s of it%s", whose, name, path, what, more)

    def _read(self, row: int) -> Record:
        try:
            return self._split.read(row)
        except (OSError, ValueError) as error:
            raise UserError(f"utterance in row {row} cannot be read ({error}); prepare the corpus again") from None


class _TrainingSource(_BatchSource):
    def __init__(self, *args: Any, start_step: int, num_steps: int) -> None:
        super().__init__(*args)
        self._start_step = start_step
        self._num_steps = num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Batch]:
        step = self._start_step + int(index)
        _, bucket_id, utterances = self._plan.batch(step)
        return self._load(step, bucket_id, utterances, np.ones(len(utterances), np.bool_))


class _EvaluationSource(_BatchSource):
    def __len__(self) -> int:
        return self._plan.num_batches

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Batch]:
        return self._load(int(index), *self._plan.evaluation_batch(int(index)))


def _prepare_worker(_index: int, _count: int) -> None:
    """Makes a worker leave with its parent, and with it only.

    A scheduler signals the whole process group, while the trainer wants to finish its step and save: so workers ignore
    SIGTERM and Ctrl-C. A parent killed outright cannot stop them: so they watch it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def faster_loading(data: DataConfig) -> str:
    """Which settings make a loader of this config deliver more, most likely first."""
    if data.num_workers:
        return f"raise data.num_workers (now {data.num_workers}) up to this host's cores, then data.prefetch ({data.prefetch})"
    return (
        f"set data.num_workers to some of this host's cores (now 0: {data.num_threads} data.num_threads of the main process"
        f" read), or raise data.num_threads and data.prefetch ({data.prefetch})"
    )


class Loader:
    """An iterator of (step, batch) that owns its workers; close it, or use it in a `with` statement.

    At most `max_waiting` batches lie in memory beside the one in use: `prefetch`, which workers share out among them.
    Each worker has four of its own at least (`_HANDED_OVER`), most of them in shared memory. A worker reads with one
    thread: more of them would only put more batches in the making.

    Raises UserError, in one line, for a record that cannot be read or a worker that died, and ends there.
    """

    def __init__(
        self,
        source: BatchSource,
        first_step: int,
        *,
        num_workers: int,
        num_threads: int,
        prefetch: int,
    ):
        share = -(-prefetch // max(num_workers, 1))
        self.max_waiting = num_workers * max(share, _HANDED_OVER) or (prefetch if num_threads else 0)
        self.num_threads = 1 if num_workers else min(num_threads, prefetch)  # that read, in each process
        ahead = max(share - _HANDED_OVER, 0) if num_workers else prefetch
        options = grain.ReadOptions(num_threads=min(self.num_threads, ahead), prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        if num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads its flags, which nobody parses in a notebook
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _prepare_worker)
        self._iterator: Any = iter(dataset)
        self._next_step = first_step

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._iterator is None:
            raise StopIteration
        try:
            step, shared = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        except UserError as error:
            self.close()
            raise UserError(str(error)) from None  # grain hangs the worker's traceback on the error
        except RuntimeError as error:
            self.close()
            if "terminated unexpectedly" not in str(error):
                raise
            mend = "it may have run out of memory: lower data.num_workers or data.prefetch"
            raise UserError(f"a data worker died before step {self._next_step} ({error}); {mend}") from None
        except BaseException:
            self.close()
            raise
        if int(step) != self._next_step:
            self.close()
            raise RuntimeError(f"the loader returned step {int(step)} instead of {self._next_step}")
        self._next_step += 1
        # Out of the worker's shared memory, which is then free at once and cannot be aliased by a device buffer.
        return int(step), {name: np.array(array, subok=False) for name, array in shared.items()}

    def close(self) -> None:
        """Stops threads and workers; the loader then is at its end. Closing twice is fine."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_loader(
    split: ReadsRows,
    plan: Plan,
    encode_text: EncodeText | None,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    rows: SelectRows | None = None,
    speaker: bool = False,
    tokens: SpeechTokenFile | None = None,
    f0: F0File | None = None,
    embeddings: SpeakerVectors | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Loader:
    """Training batches of `num_steps` steps (None: without end) from `start_step` on; same batches for any worker count.

    `rows` picks the rows of each global batch that this process loads (None: all). `speaker` adds each row's speaker,
    `tokens` its speech tokens, `embeddings` its `speaker_embedding`: a row that has none is no row; `f0` its F0.
    `encode_text` (None: no text), `split` and `rows` must be picklable when there are workers. `prefetch` batches are read
    ahead (see `Loader`), by `num_threads` threads where there are no workers; what they may take is logged.
    """
    steps = _ENDLESS if num_steps is None else num_steps
    parts = (split, plan, encode_text, rows, speaker, tokens, f0, embeddings)
    source = _TrainingSource(*parts, start_step=start_step, num_steps=steps)
    loader = Loader(source, start_step, num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)
    size = max(_batch_bytes(bucket, rows, _spec_options(plan, bucket, parts)) for bucket in plan.buckets) / 2**20
    total = loader.max_waiting * size
    where = f"this process and its {num_workers} data workers" if num_workers else "this process"
    logging.info("up to %.1f MiB of batches wait in %s: %d of %.1f MiB", total, where, loader.max_waiting, size)
    return loader


def _spec_options(plan: Plan, bucket: Bucket, parts: tuple[Any, ...]) -> dict[str, Any]:
    _, _, encode_text, _, speaker, tokens, f0, embeddings = parts
    slots = None if tokens is None else num_token_slots(bucket.num_samples, plan.rate_hz)
    has = {"text": encode_text is not None, "speaker": speaker, "f0": f0 is not None}
    return has | {"speech_tokens": slots, "speaker_embedding": None if embeddings is None else embeddings.dim}


def _batch_bytes(bucket: Bucket, rows: SelectRows | None, options: dict[str, Any]) -> int:
    whole = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in batch_spec(bucket, **options).values())
    return whole if rows is None else whole * len(rows(bucket.batch_size)) // bucket.batch_size


def make_evaluation_batches(
    split: ReadsRows,
    plan: Plan,
    encode_text: EncodeText | None,
    *,
    rows: SelectRows | None = None,
    speaker: bool = False,
    tokens: SpeechTokenFile | None = None,
    f0: F0File | None = None,
    embeddings: SpeakerVectors | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Loader:
    """Batches that show every planned utterance once, bucket by bucket; rows that only fill a shape are masked out."""
    source = _EvaluationSource(split, plan, encode_text, rows, speaker, tokens, f0, embeddings)
    return Loader(source, 0, num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)
