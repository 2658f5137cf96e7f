"""`cv2jax f0`: the fundamental frequency of every utterance of a prepared corpus, cached beside its shards.

As with `prepare`, a second run keeps the shards whose audio is unchanged, and a killed one loses those in the making.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from cv2jax.audio.f0 import METHODS, fundamental_frequency
from cv2jax.audio.mel import MEL_HOP, MEL_RATE_HZ
from cv2jax.config import UserError
from cv2jax.data.corpus_index import write_json
from cv2jax.data.f0_shard import F0_DIRECTORY, F0_VERSION, INDEX, NOTES, F0Outcome, F0Task, build_f0
from cv2jax.data.shards import Corpus
from cv2jax.jobs.pool import Progress, num_cores, run_in_order


@dataclasses.dataclass(frozen=True, kw_only=True)
class F0Result:
    """What a run did: `changed` is False where nothing was to do; the seconds count the shards it made."""

    num_utterances: int
    num_frames: int
    num_voiced: int
    num_unvoiced_utterances: int  # silence, noise, whispers, or shorter than a frame
    num_shards_made: int
    num_shards_kept: int
    speech_seconds: float
    cpu_seconds: float
    wall_seconds: float
    workers: int
    changed: bool


def compute_f0(
    corpus: str | os.PathLike[str], *, method: str = "harvest", workers: int = 0, verify: bool = False
) -> F0Result:
    """Writes CORPUS/f0: `num_samples // 480` values an utterance, in Hz, 0 where unvoiced (`audio.f0` says of what times).

    `workers` 0 takes every core; their number changes no byte. `verify` hashes the values that would be kept. Raises
    UserError for a corpus that is none or not of 24 kHz, and for one whose F0 another method began.
    """
    start = time.monotonic()
    if workers < 0:
        raise UserError(f"workers={workers}: give a number of processes, or 0 for one a core")
    opened = Corpus(corpus)
    if opened.rate_hz != MEL_RATE_HZ:
        raise UserError(
            f"{corpus}: has {opened.rate_hz} Hz, but mel and F0 are of {MEL_RATE_HZ} Hz;"
            f" prepare a corpus with --rate_hz {MEL_RATE_HZ}"
        )
    fundamental_frequency(np.zeros(0), MEL_RATE_HZ, MEL_HOP, method=method)  # not there? Say so here, not in a worker
    workers = min(workers or num_cores(), len(opened.index["shards"]))
    root = opened.path / F0_DIRECTORY
    with _locked(root):
        _settle_method(root, method)
        tasks = list(_make_tasks(opened, method, verify))
        with Progress("f0", sum(task.num_records for task in tasks)) as progress:
            count = lambda outcome: progress.add(outcome.note["num_records"], outcome.speech_seconds)  # noqa: E731
            outcomes = run_in_order(build_f0, tasks, workers, count)
        changed = _finish(opened, method, outcomes)
    total = {name: sum(o.note[name] for o in outcomes) for name in ("num_records", "num_frames", "num_voiced")}
    made = sum(outcome.built for outcome in outcomes)
    return F0Result(
        num_utterances=total["num_records"],
        num_frames=total["num_frames"],
        num_voiced=total["num_voiced"],
        num_unvoiced_utterances=sum(outcome.note["num_unvoiced_utterances"] for outcome in outcomes),
        num_shards_made=made,
        num_shards_kept=len(outcomes) - made,
        speech_seconds=sum(outcome.speech_seconds for outcome in outcomes),
        cpu_seconds=sum(outcome.cpu_seconds for outcome in outcomes),
        wall_seconds=time.monotonic() - start,
        workers=workers,
        changed=changed or made > 0,
    )


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[None]:
    """Makes the directory ours and sweeps up after a kill; UserError while another run is at work there."""
    try:
        (root / NOTES).mkdir(parents=True, exist_ok=True)
        lock = open(root / NOTES / "lock", "w")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise UserError(f"{root}: cannot write there ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{root}: another `cv2jax f0` is at work there; wait for it or stop it") from None
        for leftover in (*root.glob(".*.tmp"), *(root / NOTES).glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        try:
            yield
        except OSError as error:  # a full disk, a lost mount
            raise UserError(f"{error.filename or root}: {error.strerror or error}; what was finished is kept") from None


def _settle_method(root: pathlib.Path, method: str) -> None:
    """Notes the method of the first run; hours of it shall not be lost to a forgotten flag."""
    path = root / NOTES / "options.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))["method"]
        if found in METHODS and found != method:
            raise UserError(f"{root}: begun with method={found}, not {method}; give that, or remove {root}")
    write_json(path, {"method": method})


def _make_tasks(corpus: Corpus, method: str, verify: bool) -> Iterator[F0Task]:
    for name in corpus.splits:
        split, first_row = corpus.split(name), 0
        for shard in corpus.index["shards"]:
            if shard["split"] != name:
                continue
            yield F0Task(
                root=str(corpus.path),
                split=split,
                shard=shard["file"],
                source=shard["sha256"],
                first_row=first_row,
                num_records=shard["num_records"],
                rate_hz=corpus.rate_hz,
                hop_length=MEL_HOP,
                method=method,
                verify=verify,
            )
            first_row += shard["num_records"]


def _finish(corpus: Corpus, method: str, outcomes: list[F0Outcome]) -> bool:
    """Writes the index and removes what belongs to shards that are no more; False where all stood so."""
    root = corpus.path / F0_DIRECTORY
    kept = {str(outcome.note["file"]) for outcome in outcomes}
    stale = [path for path in root.glob("*.values") if path.name not in kept]
    for path in stale:
        path.unlink()
        (root / NOTES / f"{path.stem}.json").unlink(missing_ok=True)
    shown = ("file", "split", "num_records", "num_frames", "num_voiced", "num_unvoiced_utterances", "bytes", "sha256")
    shards = [{name: outcome.note[name] for name in shown} for outcome in outcomes]
    index: dict[str, Any] = {
        "version": F0_VERSION,
        "corpus": corpus.hash,
        "rate_hz": corpus.rate_hz,
        "hop_length": MEL_HOP,
        "method": method,
    }
    told = json.dumps([index, [shard["sha256"] for shard in shards]])
    digest = hashlib.sha256(told.encode()).hexdigest()
    return write_json(root / INDEX, index | {"hash": digest, "shards": shards}) or bool(stale)
