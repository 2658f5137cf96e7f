"""Checkpoints through Orbax v1: the one file that knows it (v1 still moves names between releases)."""

import contextlib
import itertools
import logging as standard_logging
import pathlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from cv2jax.config import UserError
from cv2jax.files import utf8_path
from cv2jax.train.disk import full_disk_reported
from cv2jax.train.hashes import state_hash
from cv2jax.train.stop import processes_with

_CHUNK_BYTES = 1 << 26  # of a file of an array, where memory is short
_NAME = "state"  # always named: the default name differs between Orbax releases
_HASH = "state_hash"  # in a checkpoint's own description


class Damaged(UserError):
    """A checkpoint that cannot be read, or whose state is not the one that was saved."""


class Checkpoints:
    """The checkpoints of a run: `directory/<step>`, written asynchronously and atomically, the newest `keep` kept.

    Each names the hash of its state, so that any bit of it that changes on the disk is noticed.
    """

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
        """Copies the state to the host, then writes in the background.

        It blocks for the copy and, only where the save before is still being written, for the rest of that: none is
        dropped. With saves further apart than the disk needs for one, the copy is all that the step waits for.
        """
        with full_disk_reported(self._directory):
            self._checkpointer.wait()  # raises what a failed background save raised
            sealed: Any = {_HASH: state_hash(state)}
            if not self._checkpointer.save_checkpointables_async(step, {_NAME: state}, custom_metadata=sealed):
                raise RuntimeError(f"Orbax refused to save step {step}; the newest is {self.latest_step}")

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises if it failed."""
        with full_disk_reported(self._directory):
            self._checkpointer.wait()

    def load(self, abstract: Any, step: int | None = None) -> Any:
        """The state of a step (default: newest) in the shapes and shardings of `abstract`; call it on every process.

        Raises UserError where the checkpoint is of another model (every leaf is listed); `Damaged`, on all processes, where
        one of them cannot read its part.
        """
        place = self._directory / str(self.latest_step if step is None else step)
        # Twice: Orbax counts the loads that a process begins, and one that is not begun everywhere would hang the next save.
        with _agreed(place):
            sealed = _check(self._checkpointer, place, abstract, step, partial=False)
        with _agreed(place):
            state = _read(place, abstract, partial=False)
        with _damage_reported(place):  # all processes together, now that all have it
            if sealed is not None and state_hash(state) != sealed:
                raise ValueError("its state is not the one that was saved")
        return state

    def restore(self, abstract: Any) -> tuple[Any, int] | None:
        """(state, step) of the newest checkpoint that every process can read; None without any.

        Newer ones that are damaged are told, in one line, and moved aside so that their steps can be saved again. Call it
        on every process. Raises `Damaged` where none can be read; then nothing is moved.
        """
        steps = sorted((info.step for info in self._checkpointer.checkpoints), reverse=True)
        reason = ""  # of the newest
        for tried, step in enumerate(steps):
            try:
                state = self.load(abstract, step)
            except Damaged as damage:
                reason = reason or str(damage).partition("; remove")[0]
                continue
            if tried:
                aside = self._set_aside(steps[:tried])
                if jax.process_index() == 0:
                    logging.warning("%s: going on from step %d; it is kept in %s", reason, step, aside)
            return state, step
        if steps:
            raise Damaged(f"{reason}, and no other can be read; give another --workdir, or move {self._directory} away")
        return None

    def _set_aside(self, steps: list[int]) -> pathlib.Path:
        """Moves checkpoints to `<directory>-damaged`, which it returns."""
        aside = self._directory.with_name(f"{self._directory.name}-damaged")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = itertools.chain([str(step)], (f"{step}.{again}" for again in itertools.count(2)))
                target = next(aside / name for name in names if not (aside / name).exists())
                (self._directory / str(step)).rename(target)
        processes_with(False)  # all wait for the move
        self._checkpointer.reload()
        return aside


@contextlib.contextmanager
def _agreed(place: pathlib.Path) -> Iterator[None]:
    """Raises `Damaged` on every process where one of them meets it inside."""
    damage = None
    try:
        yield
    except Damaged as error:
        damage = error
    failed = processes_with(damage is not None)
    if failed:
        raise damage or Damaged(f"checkpoint {place} is damaged (process {failed[0]} cannot read it); remove it")


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
    logger = standard_logging.getLogger("absl")
    is_news = lambda record: "Skipping merge of OCDBT" not in record.getMessage()  # noqa: E731
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def load_subtree(directory: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
    """Only the part of a checkpoint's state that `abstract` (nested dicts) names, for instance {'params': {'encoder': …}}.

    Raises UserError where there is no checkpoint, or where the newest is of another model or damaged.
    """
    with ocp.training.Checkpointer(utf8_path(directory.resolve(), "Orbax")) as checkpointer:
        if checkpointer.latest is None:
            raise UserError(f"no checkpoint in {directory}; train first, or give the directory of a run")
        place = directory / str(checkpointer.latest.step if step is None else step)
        _check(checkpointer, place, abstract, step, partial=True)
        return _read(place, abstract, partial=True)


def _check(checkpointer: Any, place: pathlib.Path, abstract: Any, step: int | None, *, partial: bool) -> int | None:
    """The hash that the state had when it was saved; UserError unless its shapes are those of `abstract`.

    None where an earlier release saved it, and for imported weights.
    """
    with _damage_reported(place):
        description = checkpointer.checkpointables_metadata(step)
        saved = _shapes(description.metadata.get(_NAME))
        if not saved:  # Orbax logs what it cannot read of it, and says no more
            raise ValueError("its description cannot be read")
    _check_shapes(_shapes(abstract), saved, place, partial=partial)
    return (description.custom_metadata or {}).get(_HASH)


def _read(place: pathlib.Path, abstract: Any, *, partial: bool) -> Any:
    """The state in a checkpoint's folder; if `partial`, the leaves that `abstract` has."""
    # Each process by itself: else those that can read their part would wait for those that cannot.
    alone = ocp.Context()
    alone.pytree.loading.partial_load = partial
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    with _damage_reported(place), alone:
        return ocp.load_checkpointables(utf8_path(place.resolve(), "Orbax"), {_NAME: abstract})[_NAME]


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
        raise Damaged(
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
