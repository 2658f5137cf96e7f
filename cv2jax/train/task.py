"""A stage of the pipeline as the training loop sees it."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from cv2jax.data.content import BatchContent
from cv2jax.train.state import TrainState
from cv2jax.train.step import StepFunction


@runtime_checkable
class Task(Protocol):
    """A stage of the pipeline as the loop sees it."""

    def facts(self) -> dict[str, Any]:
        """What besides the config decides the numbers (corpus hash, vocabulary), compared on resume."""
        ...

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0 with logically partitioned parameters."""
        ...

    def warm_start(self, state: TrainState) -> TrainState:
        """The state of step 0 with the parameters that `config.init_from` names in place of its own."""
        ...

    def keep(self, workdir: pathlib.Path) -> None:
        """Copies into a run's directory, unless it is there, what its use needs beside the checkpoint; one process calls it."""
        ...

    def make_step(self) -> StepFunction:
        """step(state, batch, key) → (state, metrics), not compiled."""
        ...

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Every static shape of a global batch."""
        ...

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """(step, global batch size, this process's rows) of steps start_step … num_steps - 1."""
        ...

    def content(self, step: int, local: dict[str, np.ndarray]) -> BatchContent:
        """What the batch of a step holds, of which this process has the rows `local`."""
        ...

    def planned_padding(self) -> float:
        """Padding share that the plan promises for an epoch."""
        ...

    def utterance_ids(self, step: int) -> list[str]:
        """Names of the rows of a step's global batch, for tracing."""
        ...

    def batch_sizes(self) -> set[int]:
        """Rows of every global batch, training and evaluation: each must divide over the mesh."""
        ...

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """evaluate(state) → held-out metrics, the same on every process; compiled for every shape when this returns."""
        ...
