"""Checkpoints through Orbax v1: the one file that knows it (v1 still moves names between releases)."""

import contextlib
import logging
import math
import pathlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from cv2jax.config import UserError
from cv2jax.files import utf8_path
from cv2jax.train.disk import full_disk_reported

_CHUNK_BYTES = 1 << 26  # of a file of an array, where memory is short
_READ_AT_ONCE = 1 << 28  # bytes of arrays: Orbax holds as much again of what it is reading
_NAME = "state"  # always named: the default name differs between Orbax releases


class Checkpoints:
    """The checkpoints of a run: `directory/<step>`, written asynchronously and atomically, the newest `keep` kept."""

    def __init__(self, directory: pathlib.Path, *, keep: int) -> None:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file where the checkpoints go; move it away")
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            utf8_path(directory.resolve(), "Orbax"),
            # cast: Orbax 0.12 annotates these two with protocols that its own policies miss by an argument's type.
            save_decision_policy=cast(Any, ocp.training.save_decision_policies.FixedIntervalPolicy(1)),
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with full_disk_reported(self._directory):
            self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, None without any."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host, then writes in the background; a second save waits for the first."""
        with full_disk_reported(self._directory):
            self._checkpointer.wait()  # raises what a failed background save raised
            self._checkpointer.save_checkpointables_async(step, {_NAME: state})

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises if it failed."""
        with full_disk_reported(self._directory):
            self._checkpointer.wait()

    def load(self, abstract: Any, step: int | None = None) -> Any:
        """The state of a step (default: newest) in the shapes and shardings of `abstract`.

        Raises UserError where the checkpoint is of another model (every leaf is listed) or damaged.
        """
        return _load(self._checkpointer, self._directory, abstract, step, partial=False)


def save_frugally(directory: pathlib.Path, step: int, state: Any) -> None:
    """Writes one checkpoint and returns when it is on disk, with some 0.3 GB of memory beside the state's own.

    For what is as large as memory allows. `Checkpoints.save` copies the state, and holds all that it has compressed of it.

    Args:
      directory: of the checkpoints. state: nested dicts of host arrays, which this process has whole.
    """
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    context.array_options.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=_CHUNK_BYTES
    )
    context.memory_options.deepcopy_host_arrays = False
    with (
        full_disk_reported(directory),
        _nothing_to_merge(),
        ocp.training.Checkpointer(utf8_path(directory.resolve(), "Orbax"), context=context) as checkpointer,
    ):
        checkpointer.save_checkpointables(step, {_NAME: state})


@contextlib.contextmanager
def _nothing_to_merge() -> Iterator[None]:
    """Keeps Orbax from warning that files of its other format, which were not asked for, are not there."""
    logger = logging.getLogger("absl")
    is_news = lambda record: "Skipping merge of OCDBT" not in record.getMessage()  # noqa: E731
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def load_subtree(directory: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
    """Only the part of a checkpoint's state that `abstract` (nested dicts) names, for instance {'params': {'encoder': …}}.

    Peak memory is what is loaded, and as much as its largest array beside it. None stands for what is not wanted.
    Raises UserError where there is no checkpoint, or where the newest is of another model or damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with ocp.training.Checkpointer(utf8_path(directory.resolve(), "Orbax"), context=context) as checkpointer:
        if checkpointer.latest is None:
            raise UserError(f"no checkpoint in {directory}; train first, or give the directory of a run")
        return _load(checkpointer, directory, abstract, step, partial=True)


def _load(checkpointer: Any, directory: pathlib.Path, abstract: Any, step: int | None, *, partial: bool) -> Any:
    """The state of a step (default: newest), all or, if `partial`, the leaves that `abstract` has."""
    place = directory / str(checkpointer.latest.step if step is None else step)
    with _damage_reported(place):
        saved = _shapes(checkpointer.checkpointables_metadata(step).metadata.get(_NAME))
        if not saved:  # Orbax logs what it cannot read of it, and says no more
            raise ValueError("its description cannot be read")
    _check_shapes(_shapes(abstract), saved, place, partial=partial)
    leaves, structure = jax.tree.flatten(abstract)
    loaded: list[Any] = [None] * len(leaves)
    with _damage_reported(place):
        for part in _parts(leaves) if partial else [range(len(leaves))]:
            wanted = structure.unflatten([leaf if i in part else None for i, leaf in enumerate(leaves)])
            read = checkpointer.load_checkpointables(step, {_NAME: wanted})[_NAME]
            for i, array in zip(sorted(part), jax.tree.leaves(read), strict=True):
                loaded[i] = array
    return structure.unflatten(loaded)


def _parts(leaves: Sequence[Any]) -> list[set[int]]:
    """The places of the arrays in parts of _READ_AT_ONCE bytes or one array, the largest first: while little else is there."""
    sizes = {i: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for i, leaf in enumerate(leaves)}
    parts: list[set[int]] = []
    room = -1
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        if sizes[i] > room:
            parts.append(set())
            room = _READ_AT_ONCE
        parts[-1].add(i)
        room -= sizes[i]
    return parts or [set()]


@contextlib.contextmanager
def _damage_reported(place: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        # Orbax makes a KeyError of whatever a reader raises: also of Ctrl-C and full memory, which are no damage.
        cause = error.__cause__ or error
        if isinstance(cause, KeyboardInterrupt | MemoryError) or "RESOURCE_EXHAUSTED" in str(cause):
            raise cause from None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].split(". See full")[0][:120]
        raise UserError(
            f"checkpoint {place} is damaged ({reason}); remove that folder and give the same command: "
            "it goes on from the one before"
        ) from error


def _check_shapes(ours: dict[str, Any], theirs: dict[str, Any], place: pathlib.Path, *, partial: bool) -> None:
    lines = [
        f"{key}: model {ours.get(key, 'absent')}, checkpoint {theirs.get(key, 'absent')}"
        for key in sorted(set(ours) if partial else set(ours) | set(theirs))
        if ours.get(key) != theirs.get(key)
    ]
    if lines:
        shown = "; ".join(lines[:5]) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
        raise UserError(f"checkpoint {place} is of another model: {shown}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_plain_path(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _plain_path(path: Any) -> str:
    """A key path without the difference between attributes, dictionary keys and indices: metadata knows only dictionaries."""
    names = (getattr(e, "key", getattr(e, "name", getattr(e, "idx", e))) for e in path)
    return "/".join(map(str, names))
