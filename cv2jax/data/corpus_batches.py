"""The batches of a run on a prepared corpus, to train on and to judge by: what every stage that reads audio shares."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cv2jax.audio.mel import MEL_RATE_HZ
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.batch import Batch, EncodeText, batch_spec, num_token_slots
from cv2jax.data.content import BatchContent
from cv2jax.data.f0 import F0File
from cv2jax.data.loader import make_evaluation_batches, make_loader
from cv2jax.data.plan import Plan, make_plan
from cv2jax.data.shards import Corpus, Split
from cv2jax.data.speaker_vectors import SpeakerVectors
from cv2jax.data.subset import SplitSubset, spread_rows
from cv2jax.data.tokens import SpeechTokenFile
from cv2jax.parallel.distributed import local_rows

BatchShape = dict[str, jax.ShapeDtypeStruct]
_ROWS_TRIED = 16  # of a split, for whether the token file is the corpus's


class CorpusBatches:
    """Plans of the training split and of the held-out rows that each evaluation looks at, and their loaders.

    Batches hold texts, or with `speech_tokens` those of `config.data.speech_tokens` and speakers: then texts, which are
    not read, leave no utterance out; with `speaker` speakers alone, with `f0` what `cv2jax f0` wrote, and no texts either.
    `embeddings` adds those of `config.data.speaker_embeddings`, where that names a file. `tokens` and `embeddings` say what
    made theirs. Raises UserError for a corpus, split or file that is not there, where no utterance is left to plan, and for
    tokens, F0 or embeddings of another corpus.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        require_text: bool,
        speech_tokens: bool = False,
        speaker: bool = False,
        f0: bool = False,
        embeddings: bool = False,
    ) -> None:
        self._config, self._require_text = config, require_text
        self._speaker = speaker or speech_tokens
        data = config.data
        if not data.corpus:
            raise UserError("data.corpus is not set: give --corpus DIR, a directory written by `cv2jax prepare`")
        self.corpus = Corpus(data.corpus)
        self.rate_hz = self.corpus.rate_hz
        self.train, self.held_out = self.corpus.split(data.train_split), self.corpus.split(data.eval_split)
        self.tokens = self._open_tokens() if speech_tokens else None
        self.embeddings = self._open_embeddings() if embeddings and data.speaker_embeddings else None
        if f0 and self.rate_hz != MEL_RATE_HZ:
            raise UserError(
                f"data.corpus={data.corpus}: has {self.rate_hz} Hz, the vocoder needs {MEL_RATE_HZ} Hz; run `cv2jax prepare`"
                f" with --rate_hz {MEL_RATE_HZ}"
            )
        self.f0, judged_f0 = (F0File(self.corpus, s.name) if f0 else None for s in (self.train, self.held_out))
        self._has_text = not self._speaker and not f0
        self.plan = self._make_plan(self.train, data.num_buckets)
        rows = spread_rows(len(self.held_out), config.evaluate_utterances)
        self._judged = SplitSubset(self.held_out, rows)
        self._judged_f0 = judged_f0 and judged_f0.take(rows)
        self._judged_plan = self._make_plan(self._judged, min(data.num_buckets, 2))
        logging.info("training batches of %s\n%s", data.corpus, self.plan.table())

    def _open_tokens(self) -> SpeechTokenFile:
        data = self._config.data
        if not data.speech_tokens:
            raise UserError("data.speech_tokens is not set: give the file that `cv2jax encode` wrote for the corpus")
        tokens = SpeechTokenFile(data.speech_tokens)
        for split in (self.train, self.held_out):
            some = [split.read(int(row)).id for row in spread_rows(len(split), _ROWS_TRIED)]
            if not any(identity in tokens for identity in some):
                raise UserError(
                    f"data.speech_tokens={data.speech_tokens}: has no tokens of {some[0]!r} and {len(some) - 1} others"
                    f" of split {split.name} of {data.corpus}; run `cv2jax encode` on the manifest it was prepared from"
                )
        return tokens

    def _open_embeddings(self) -> SpeakerVectors:
        data = self._config.data
        vectors = SpeakerVectors(data.speaker_embeddings, data.embedding_of)
        for split in (self.train, self.held_out):
            some = [split.read(int(row)) for row in spread_rows(len(split), _ROWS_TRIED)]
            if all(vectors.find(record) is None for record in some):
                raise UserError(
                    f"data.speaker_embeddings={data.speaker_embeddings}: has no embedding of {vectors.of}"
                    f" {vectors.name(some[0])!r} and those of {len(some) - 1} other records of split {split.name} of"
                    f" {data.corpus}; run `cv2jax embed` on the manifest it was prepared from"
                )
        return vectors

    def _make_plan(self, split: Split | SplitSubset, num_buckets: int) -> Plan:
        data = self._config.data
        return make_plan(
            split.num_samples,
            split.num_characters if self._has_text else np.broadcast_to(np.int32(0), len(split)),
            rate_hz=self.rate_hz,
            seed=self._config.seed,
            batch_seconds=data.batch_seconds,
            batch_multiple=data.batch_multiple,
            num_buckets=num_buckets,
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
            max_characters_per_second=data.max_characters_per_second,
            require_text=self._require_text,
            name=split.name,
        )

    @property
    def max_text(self) -> int:
        """The longest text of any batch, of the whole held-out split too: it must not hang on how much of it is judged."""
        plans = (self.plan, self._make_plan(self.held_out, 1))
        return max(bucket.num_text for plan in plans for bucket in plan.buckets)

    def sizes(self) -> set[int]:
        """Rows of the global batches, training and evaluation."""
        return {bucket.batch_size for plan in (self.plan, self._judged_plan) for bucket in plan.buckets}

    def training_shapes(self) -> list[BatchShape]:
        """Shapes of the global training batches, one a bucket."""
        return self._shapes(self.plan)

    def held_out_shapes(self) -> list[BatchShape]:
        """Shapes of the global evaluation batches."""
        return self._shapes(self._judged_plan)

    def _shapes(self, plan: Plan) -> list[BatchShape]:
        shapes = []
        for bucket in plan.buckets:
            slots = None if self.tokens is None else num_token_slots(bucket.num_samples, self.rate_hz)
            has = {"text": self._has_text, "speaker": self._speaker, "f0": self.f0 is not None}
            size = None if self.embeddings is None else self.embeddings.dim
            spec = batch_spec(bucket, **has, speech_tokens=slots, speaker_embedding=size)
            shapes.append({name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()})
        return shapes

    def training(
        self, start_step: int, num_steps: int, mesh: Mesh, encode_text: EncodeText | None = None
    ) -> Iterator[tuple[int, int, Batch]]:
        """(step, rows of the global batch, this process's rows) of steps start_step … num_steps - 1."""
        data = self._config.data
        loader = make_loader(
            self.train,
            self.plan,
            encode_text,
            start_step=start_step,
            num_steps=num_steps - start_step,
            rows=self._rows(mesh),
            speaker=self._speaker,
            tokens=self.tokens,
            f0=self.f0,
            embeddings=self.embeddings,
            num_workers=data.num_workers,
            num_threads=data.num_threads,
            prefetch=data.prefetch,
        )
        with loader:
            for step, batch in loader:
                yield step, self.plan.buckets[self.plan.batch(step)[1]].batch_size, batch

    def judged(self, mesh: Mesh, encode_text: EncodeText | None = None) -> Iterator[tuple[int, Batch]]:
        """(rows of the global batch, this process's rows) of every held-out batch."""
        options = {"rows": self._rows(mesh), "speaker": self._speaker, "tokens": self.tokens, "f0": self._judged_f0}
        source = (self._judged, self._judged_plan, encode_text)
        with make_evaluation_batches(*source, **options, embeddings=self.embeddings) as loader:
            for index, batch in loader:
                yield self._judged_plan.buckets[self._judged_plan.evaluation_batch(index)[0]].batch_size, batch

    def content(self, step: int, local: Batch) -> BatchContent:
        """What a step's batch holds, of which this process has the rows `local`."""
        epoch, bucket, rows = self.plan.batch(step)
        return BatchContent(
            epoch=epoch,
            bucket=bucket,
            num_utterances=len(rows),
            used=float(np.sum(local["num_samples"], where=local["row_mask"])) / self.rate_hz,
            slots=local["waveform"].size / self.rate_hz,
            unit="audio_seconds",
        )

    def utterance_ids(self, step: int) -> list[str]:
        """Manifest ids of a step's rows."""
        return [self.train.read(int(row)).id for row in self.plan.batch(step)[2]]

    def _rows(self, mesh: Mesh) -> Callable[[int], Any]:
        """Which rows of a batch are ours: a table and not a function of the mesh, as loader processes touch no device."""
        table: dict[int, np.ndarray] = {size: local_rows(mesh, size) for size in self.sizes()}
        return table.__getitem__
