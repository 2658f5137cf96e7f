"""`cv2jax prepare`: from a manifest and audio files to a corpus of shards; parallel, resumable, idempotent.

A second run on the same directory works like make: shards whose manifest lines, audio files and options are unchanged
are kept, the others made again. Killed at any moment, it loses at most the shards in the making. Shards depend on nothing
but their task, so whoever sees the paths may make them: worker processes here, parts on other machines, or Apache Beam.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from cv2jax.audio.io import MIN_RATE_HZ
from cv2jax.config import UserError
from cv2jax.data.corpus_index import ShardColumns, shard_name, write_index, write_json
from cv2jax.data.manifest import ManifestScan, scan_manifest
from cv2jax.data.parts import Part
from cv2jax.data.prepare_report import write_report
from cv2jax.data.shard_builder import PrepareOptions, ShardOutcome, ShardTask, build_shard, load_columns, note_path
from cv2jax.data.shards import ENCODINGS
from cv2jax.jobs.parts import find_part
from cv2jax.jobs.pool import Progress, num_cores, run_in_order
from cv2jax.text.characters import CharacterVocabulary

# So many shards, for the sake of parallel work and resuming, within these sizes.
_TARGET_SHARDS = 64
_SHARD_UTTERANCES = (8, 2048)

Plan = list[tuple[str, int, int, int]]  # (split, shard number, first and last of the split's own rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """What a run did: `changed` is False where nothing was to do; `speech_seconds` counts the shards it made."""

    num_utterances: int
    num_refused: int
    num_warnings: int
    total_seconds: float
    num_shards_made: int
    num_shards_kept: int
    speech_seconds: float
    wall_seconds: float
    workers: int
    peak_worker_bytes: int
    changed: bool


def prepare(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rate_hz: int = 24000,
    encoding: str = "flac",
    workers: int = 0,
    shard_utterances: int = 0,
    vocabulary: str | os.PathLike[str] | None = None,
    strict: bool = False,
    verify: bool = False,
    part: str | None = None,
    engine: str = "local",
    beam_options: Sequence[str] = (),
) -> PrepareResult:
    """Makes the corpus `out` from `manifest`; bad utterances are refused and reported, the others kept.

    `workers` 0 takes every core, `shard_utterances` 0 a size by the number of utterances. `vocabulary` is a JSON list
    of characters that normalised text must keep to, or a run.json, which holds one. `strict` stops at the first bad
    utterance, `verify` hashes the shards that would be kept. The bytes written depend on manifest, audio and options
    alone, not on `workers`, machines or kills.

    `part` ("i/n", or "auto" under a launcher) only makes each n-th shard: machines that see the same paths share the work, and
    the command without `part` then keeps their shards and writes index and report. `engine` "beam" has an Apache Beam
    pipeline make the shards, on the runner of `beam_options`, else in `workers` processes here.
    Raises UserError, with what was finished kept, for options, files and splits that nothing can be made from.
    """
    start = time.monotonic()
    manifest, out = pathlib.Path(manifest).absolute(), pathlib.Path(out).absolute()
    _check_options(rate_hz, encoding, workers, shard_utterances)
    options = PrepareOptions(rate_hz=rate_hz, encoding=encoding, vocabulary=_load_vocabulary(vocabulary))
    workers = workers or num_cores()
    chosen = None if part is None else find_part(part)
    build = _engine(engine, beam_options, chosen, workers)
    scan = scan_manifest(manifest, strict=strict)
    with _locked(out, shared=chosen is not None):
        shard_utterances = _settle_options(out, options, shard_utterances, len(scan.line))
        plan = _plan(scan, shard_utterances)
        ours = plan if chosen is None else [plan[number] for number in chosen.blocks(len(plan))]
        tasks = _make_tasks(scan, ours, out, options, strict=strict, verify=verify)
        total = sum(last - first for _, _, first, last in ours)
        outcomes = build(tasks, total=total, workers=max(min(workers, len(ours)), 1))
        changed = chosen is None and _finish(out, scan, plan, options)
    num_refused = sum(outcome.num_refused for outcome in outcomes)
    made = [outcome for outcome in outcomes if outcome.built]
    return PrepareResult(
        num_utterances=total - num_refused,
        num_refused=num_refused + (len(scan.refused) if chosen is None else 0),
        num_warnings=sum(outcome.num_warnings for outcome in outcomes),
        total_seconds=math.fsum(outcome.speech_seconds for outcome in outcomes),
        num_shards_made=len(made),
        num_shards_kept=len(outcomes) - len(made),
        speech_seconds=math.fsum(outcome.speech_seconds for outcome in made),
        wall_seconds=time.monotonic() - start,
        workers=workers,
        peak_worker_bytes=max((outcome.peak_bytes for outcome in outcomes), default=0),
        changed=changed or bool(made),
    )


def _check_options(rate_hz: int, encoding: str, workers: int, shard_utterances: int) -> None:
    if not MIN_RATE_HZ <= rate_hz <= 192_000:
        raise UserError(f"rate_hz={rate_hz}: give a sample rate from {MIN_RATE_HZ} to 192000 Hz (the model's is 24000)")
    if encoding not in ENCODINGS:
        raise UserError(f"encoding={encoding}: choose {' or '.join(ENCODINGS)}")
    if workers < 0:
        raise UserError(f"workers={workers}: give a number of processes, or 0 for one a core")
    if shard_utterances < 0:
        raise UserError(f"shard_utterances={shard_utterances}: give a number of utterances, or 0 for a size that fits")


def _engine(
    engine: str, beam_options: Sequence[str], part: Part | None, workers: int
) -> Callable[..., list[ShardOutcome]]:
    """What turns tasks into outcomes; UserError for an engine that is unknown, not installed or given what it cannot use."""
    if engine not in ("local", "beam"):
        raise UserError(f"engine={engine}: choose local or beam")
    if engine == "local":
        if beam_options:
            raise UserError(f"{beam_options[0]}: options behind OUT are Beam's; give --engine beam with them")
        return _run
    if part is not None:
        raise UserError("--part and --engine beam: choose one; Beam hands out the shards itself")
    from cv2jax.jobs.prepare_beam import make_pipeline

    return make_pipeline(beam_options, workers)


def _load_vocabulary(path: str | os.PathLike[str] | None) -> frozenset[str] | None:
    if path is None:
        return None
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"vocabulary {path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"vocabulary {path}: not JSON ({error}); expected a list of characters") from None
    if isinstance(values, dict) and isinstance(values.get("facts"), dict):  # of `cv2jax train`
        values = values["facts"].get("vocabulary")
    return frozenset(CharacterVocabulary.from_json(values, str(path)).characters)


@contextlib.contextmanager
def _locked(out: pathlib.Path, *, shared: bool) -> Iterator[None]:
    """Makes the directory ours: refuses one with other contents or another run at work; sweeps up after a kill.

    `shared` lets other parts in, and leaves their files alone.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a directory for the corpus")
    notes = out / ".prepare"
    if not notes.is_dir() and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out}: holds other files and is not from `cv2jax prepare`; give an empty or new directory")
    try:
        notes.mkdir(parents=True, exist_ok=True)
        (out / "shards").mkdir(exist_ok=True)
        lock = open(notes / "lock", "a+")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another `cv2jax prepare` is at work there; wait for it or stop it") from None
        except OSError as error:  # a file system without locks: every write is whole and may be repeated
            logging.warning(
                "%s: cannot lock it (%s); run one command at a time there, parts aside", out, error.strerror
            )
        for directory in () if shared else (out, notes, out / "shards", out / "index"):
            for leftover in directory.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        try:
            yield
        except OSError as error:  # a full disk, a lost mount, a manifest that vanished
            raise UserError(f"{error.filename or out}: {error.strerror or error}; what was finished is kept") from None


def _settle_options(out: pathlib.Path, options: PrepareOptions, shard_utterances: int, num_utterances: int) -> int:
    """Returns the utterances of a shard, as the first run chose them; UserError where a run had other options.

    Redoing a large corpus because of a mistyped flag would be worse than asking for another directory.
    """
    path = out / ".prepare" / "options.json"
    smallest, largest = _SHARD_UTTERANCES
    fitting = min(max(1 << (max(num_utterances // _TARGET_SHARDS, 1) - 1).bit_length(), smallest), largest)
    wanted = {"rate_hz": options.rate_hz, "encoding": options.encoding, "shard_utterances": shard_utterances or fitting}
    if path.is_file():
        found = _load_options(path, set(wanted))
        if not shard_utterances:
            wanted["shard_utterances"] = found["shard_utterances"]
        for name, value in wanted.items():
            if found[name] != value:
                raise UserError(f"{out}: begun with {name}={found[name]}, not {value}; give that, or a new directory")
    write_json(path, wanted)
    return wanted["shard_utterances"]


def _load_options(path: pathlib.Path, names: set[str]) -> dict[str, Any]:
    """What the first run chose; UserError where the file does not say so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not UTF-8
        found = None
    if not isinstance(found, dict) or not names <= set(found):
        mend = "remove that file and give the same command with the options of the first run"
        raise UserError(f"{path}: is damaged: not the JSON of {', '.join(sorted(names))}; {mend}")
    return found


def _plan(scan: ManifestScan, shard_utterances: int) -> Plan:
    """Returns the shards: a fixed number of each split's lines, in file order."""
    plan = []
    for split in scan.splits:
        count = len(scan.rows(split))
        for number, first in enumerate(range(0, count, shard_utterances)):
            plan.append((split, number, first, min(first + shard_utterances, count)))
    return plan


def _make_tasks(
    scan: ManifestScan,
    plan: Plan,
    out: pathlib.Path,
    options: PrepareOptions,
    *,
    strict: bool,
    verify: bool,
) -> Iterator[ShardTask]:
    rows: dict[str, np.ndarray] = {}
    for split, number, first, last in plan:
        if split not in rows:
            rows = {split: scan.rows(split)}  # one split's at a time
        chosen = rows[split][first:last]
        yield ShardTask(
            root=str(out),
            manifest=str(scan.path),
            split=split,
            number=number,
            offset=scan.offset[chosen],
            line=scan.line[chosen],
            options=options,
            strict=strict,
            verify=verify,
        )


def _run(tasks: Iterator[ShardTask], *, total: int, workers: int) -> list[ShardOutcome]:
    """The outcomes in order; stops at the first error in that order."""
    with Progress("prepare", total) as progress:

        def take(outcome: ShardOutcome) -> None:
            if outcome.error is not None:
                raise UserError(f"{outcome.error} (--strict: stopped; what was finished is kept)")
            seconds = outcome.speech_seconds if outcome.built else 0.0
            progress.add(outcome.num_utterances, seconds, outcome.num_refused)

        return run_in_order(build_shard, tasks, workers, take)


def _finish(out: pathlib.Path, scan: ManifestScan, plan: Plan, options: PrepareOptions) -> bool:
    """Writes report and index from the shards' notes and removes shards no longer planned; False where all stood so."""
    notes = [note_path(out, split, number) for split, number, _, _ in plan]
    stale = _remove_stale(out, plan)
    kept: dict[str, dict[str, Any]] = {split: {"num_utterances": 0, "seconds": 0.0} for split in scan.splits}
    for (split, *_), note in zip(plan, notes, strict=True):
        columns = load_columns(note)
        if columns is not None:
            kept[split]["num_utterances"] += columns.summary.num_records
            kept[split]["seconds"] += columns.summary.num_samples / options.rate_hz
    for counts in kept.values():
        counts["seconds"] = round(counts["seconds"], 3)
    changed = write_report(out, manifest=scan.path, kept=kept, refused=scan.refused, notes=notes)
    for split, counts in kept.items():
        if not counts["num_utterances"]:
            (out / "index.json").unlink(missing_ok=True)
            raise UserError(f'split "{split}" is empty: every utterance of it was refused; see {out / "report.md"}')

    def read_shards() -> Iterator[ShardColumns]:
        return (columns for columns in map(load_columns, notes) if columns is not None)

    written = write_index(out, rate_hz=options.rate_hz, encoding=options.encoding, read_shards=read_shards)
    return written or changed or stale


def _remove_stale(out: pathlib.Path, plan: Plan) -> bool:
    """Removes shards and notes of an earlier manifest; True where there were any."""
    planned = {shard_name(split, number) for split, number, _, _ in plan}
    planned |= {note_path(out, split, number).name for split, number, _, _ in plan} | {"options.json"}
    present = (*(out / "shards").iterdir(), *(out / ".prepare").glob("*.json"))
    stale = [path for path in present if path.name not in planned]
    if stale:
        (out / "index.json").unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    return bool(stale)
