"""What the stages that train on prepared audio share: their batches come from the corpus and its plan."""

import pathlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from cv2jax.data.batch import Batch, EncodeText
from cv2jax.data.content import BatchContent
from cv2jax.data.corpus_batches import CorpusBatches


class AudioTask:
    """The part of the loop's `Task` that `CorpusBatches` answers.

    Attributes:
      _encode_text: text to ids, of a stage whose batches hold texts.
    """

    _encode_text: EncodeText | None = None

    def __init__(self, data: CorpusBatches) -> None:
        self._data = data

    def keep(self, workdir: pathlib.Path) -> None:
        """Nothing: `run.json` and the checkpoint are all that the use of a run needs."""
        del workdir

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One a bucket of the plan."""
        return self._data.training_shapes()

    def batch_sizes(self) -> set[int]:
        """Of training and evaluation."""
        return self._data.sizes()

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, Batch]]:
        """This process's rows of each step's batch."""
        return self._data.training(start_step, num_steps, mesh, self._encode_text)

    def content(self, step: int, local: Batch) -> BatchContent:
        """What a step's batch holds."""
        return self._data.content(step, local)

    def planned_padding(self) -> float:
        """Padding share of an epoch."""
        return self._data.plan.stats.padding_share

    def utterance_ids(self, step: int) -> list[str]:
        """Manifest ids of a step's rows."""
        return self._data.utterance_ids(step)
