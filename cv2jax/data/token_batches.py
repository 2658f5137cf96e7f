"""The batches of a run on a token corpus: packed rows to train on, and held-out utterances to judge by."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Bool, Int64

from cv2jax.config import TrainConfig, UserError
from cv2jax.data.batch import Batch
from cv2jax.data.content import BatchContent
from cv2jax.data.loader import Loader
from cv2jax.data.packed_batch import bistream_coins, pack_rows
from cv2jax.data.packing import PackedRows, PackingPlan, make_packing
from cv2jax.data.subset import spread_rows
from cv2jax.data.token_corpus import TokenCorpus, TokenRecord, TokenSplit
from cv2jax.parallel.distributed import local_rows

# (utterance, its coin) → its row: `token kind targets` [P]; picklable.
LayOut = Callable[[TokenRecord, float], Any]
_JUDGED_EPOCH = (1 << 31) - 1  # whose coins lay out what is judged: always the same


class TokenBatches:
    """Packing plans of the training split and of the held-out rows that an evaluation looks at, and their loaders.

    The model lays an utterance out in one position a token and `overhead` more. Raises UserError for a corpus or split
    that is not there, and where no utterance is left to pack.
    """

    def __init__(self, config: TrainConfig, *, overhead: int) -> None:
        data = config.data
        if not data.corpus:
            raise UserError("data.corpus is not set: give --corpus DIR, a directory written by `cv2jax tokenize`")
        self._config, self._overhead = config, overhead
        self.corpus = TokenCorpus(data.corpus)
        prefix = self.corpus.metadata.prefix
        if data.prefix not in ("", prefix):
            mend = f"tokenize it again with --prefix {data.prefix}, or set data.prefix={prefix}"
            raise UserError(f"data.corpus={data.corpus}: its texts have the prefix {prefix}; {mend}")
        self.train, self.held_out = self.corpus.split(data.train_split), self.corpus.split(data.eval_split)
        self.plan = self._pack(self.train, {})
        judged = np.zeros(len(self.held_out), np.bool_)
        judged[spread_rows(len(self.held_out), config.evaluate_utterances)] = True
        self._judged_plan = self._pack(self.held_out, {"not judged": judged})
        logging.info("training batches of %s\n%s", data.corpus, self.plan.table())

    def _pack(self, split: TokenSplit, keep: dict[str, Bool[np.ndarray, "N"]]) -> PackingPlan:
        data = self._config.data
        return make_packing(
            split.num_text + split.num_speech + np.int32(self._overhead),
            row_length=data.row_length,
            max_segments=data.max_segments,
            batch_rows=data.batch_rows,
            seed=self._config.seed,
            keep={"without text": split.num_text > 0, "without speech": split.num_speech > 0} | keep,
            name=split.name,
        )

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of every global batch, training and evaluation: `pack_rows`' arrays."""
        data = self._config.data
        shape = (data.batch_rows, data.row_length)
        names = ("token", "kind", "targets", "positions", "segments")
        specs = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
        return specs | {"utterance": jax.ShapeDtypeStruct((data.batch_rows, data.max_segments), np.int32)}

    def training(
        self, start_step: int, num_steps: int, mesh: Mesh, lay_out: LayOut
    ) -> Iterator[tuple[int, int, Batch]]:
        """(step, rows of the global batch, this process's rows) of steps start_step … num_steps - 1."""
        data = self._config.data
        rows = self._rows(mesh)
        source = _PackedSource(self.train, self.plan, lay_out, rows, start_step=start_step, num_steps=num_steps)
        options = {"num_workers": data.num_workers, "num_threads": data.num_threads, "prefetch": data.prefetch}
        with Loader(source, start_step, **options) as loader:
            for step, batch in loader:
                yield step, data.batch_rows, batch

    def judged(self, mesh: Mesh, lay_out: LayOut) -> Iterator[tuple[int, Batch]]:
        """(rows of the global batch, this process's rows) of every held-out batch."""
        source = _PackedSource(self.held_out, self._judged_plan, lay_out, self._rows(mesh))
        with Loader(source, 0, num_workers=0, num_threads=2, prefetch=4) as loader:
            for _, batch in loader:
                yield self._config.data.batch_rows, batch

    def examples(self, count: int) -> list[TokenRecord]:
        """Some held-out utterances, always the same, spread over the split; without those that are not packed either."""
        text, speech = self.held_out.num_text, self.held_out.num_speech
        fits = text + speech + self._overhead <= self._config.data.row_length
        usable = np.flatnonzero((text > 0) & (speech > 0) & fits)
        return [self.held_out.read(int(usable[row])) for row in spread_rows(len(usable), count)]

    def content(self, step: int, local: Batch) -> BatchContent:
        """What a step's batch holds, of which this process has the rows `local`."""
        epoch, rows = self.plan.batch(step)
        return BatchContent(
            epoch=epoch,
            bucket=0,
            num_utterances=sum(map(len, rows)),
            used=float(np.count_nonzero(local["segments"])),
            slots=float(local["segments"].size),
            unit="tokens",
        )

    def utterance_ids(self, step: int) -> list[str]:
        """Of each row of a step's global batch, the manifest ids of the utterances in it."""
        _, rows = self.plan.batch(step)
        return [" + ".join(self.train.read(int(i)).id for i in row) for row in rows]

    def _rows(self, mesh: Mesh) -> Int64[np.ndarray, "B"]:
        return np.asarray(local_rows(mesh, self._config.data.batch_rows), np.int64)


class _PackedSource:
    """Random access to this process's rows of packed batches; with a number of steps for training, without for judging."""

    def __init__(
        self,
        split: TokenSplit,
        plan: PackingPlan,
        lay_out: LayOut,
        local: Int64[np.ndarray, "B"],
        *,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        self._split, self._plan, self._lay_out, self._local = split, plan, lay_out, local
        self._start_step, self._num_steps = start_step, num_steps

    def __len__(self) -> int:
        return self._plan.num_batches if self._num_steps is None else self._num_steps - self._start_step

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Batch]:
        step = self._start_step + int(index)
        if self._num_steps is None:
            epoch, rows = _JUDGED_EPOCH, self._plan.evaluation_batch(step)[0]
        else:
            epoch, rows = self._plan.batch(step)
        return np.array(step, np.int64), self._pack([rows[i] for i in self._local], epoch)

    def _pack(self, rows: PackedRows, epoch: int) -> Batch:
        laid_out = []
        for row in rows:
            coins = bistream_coins(self._plan.seed, epoch, row)
            laid_out.append(
                [self._lay_out(self._split.read(int(i)), c) for i, c in zip(row, coins.tolist(), strict=True)]
            )
        return pack_rows(laid_out, rows, length=self._plan.row_length, max_segments=self._plan.max_segments)
