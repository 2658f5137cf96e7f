"""One shard of `cv2jax prepare`, made whole or not at all: a pure function of manifest lines, audio files and options.

The plan gives a split's lines to shards in file order, a fixed number each, so that no worker count changes a byte.
Beside every finished shard stands a note (`OUT/.prepare/<shard>.json`) with its fingerprint, its index columns and what
was refused; a shard whose note agrees with the manifest lines, the audio files (size and time of change) and the
options is kept, any other is made again. Workers import neither jax nor scipy.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np

from cv2jax.audio.io import check_audio, convert_rate, read_audio, to_int16
from cv2jax.audio.tar import split_tar_source
from cv2jax.config import DataConfig, UserError
from cv2jax.data.corpus_index import ColumnCollector, ShardColumns, shard_name
from cv2jax.data.manifest import Utterance, parse_utterance
from cv2jax.data.shards import FORMAT_VERSION, Record, ShardSummary, ShardWriter, sync_and_hash
from cv2jax.files import temporary_beside
from cv2jax.text.characters import normalize_transcript

LONG_SECONDS = 30.0  # the speech tokenizer's longest input in one piece; the loader leaves longer utterances out
# Nobody speaks so fast: the text is of something else, and training leaves it out by default.
FAST_CHARACTERS_PER_SECOND = DataConfig.max_characters_per_second
_MAX_SAMPLES = 2**31 - 1  # columns are int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the bytes of a shard besides manifest and audio; `vocabulary` None admits every character."""

    rate_hz: int
    encoding: str
    vocabulary: frozenset[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardTask:
    """The lines of one shard and where it goes."""

    root: str
    manifest: str
    split: str
    number: int
    offset: np.ndarray  # byte offset of each line in the manifest
    line: np.ndarray  # its line number
    options: PrepareOptions
    strict: bool
    verify: bool

    @property
    def shard_path(self) -> pathlib.Path:
        """Where the shard goes."""
        return pathlib.Path(self.root, "shards", shard_name(self.split, self.number))

    @property
    def note_path(self) -> pathlib.Path:
        """Where the note on the finished shard goes."""
        return note_path(self.root, self.split, self.number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """What a worker tells of one shard; `error` is the strict mode's first refusal, `peak_bytes` its memory so far."""

    num_utterances: int
    num_refused: int
    num_warnings: int
    speech_seconds: float
    built: bool
    peak_bytes: int
    error: str | None = None


def note_path(root: str | os.PathLike[str], split: str, number: int) -> pathlib.Path:
    """Where the note on a finished shard lies."""
    return pathlib.Path(root, ".prepare", f"{split}-{number:05d}.json")


def build_shard(task: ShardTask) -> ShardOutcome:
    """Makes one shard and its note, unless both are there and agree with the task."""
    lines = list(_read_lines(task))
    fingerprint = _fingerprint(task, lines)
    note = _load_note(task, fingerprint)
    built = note is None
    if note is None:
        # From here on the old index would lie; it comes back when every shard is in place.
        pathlib.Path(task.root, "index.json").unlink(missing_ok=True)
        note = _make_shard(task, lines, fingerprint)
    if task.strict and note["refused"]:
        first = note["refused"][0]
        error = f"{task.manifest}:{first['line']}: {first['reason']}"
        return _outcome(task, note, built=built, error=error)
    return _outcome(task, note, built=built)


def load_columns(path: pathlib.Path) -> ShardColumns | None:
    """Returns the index columns in a note, None where the shard holds no record."""
    note = json.loads(path.read_text(encoding="utf-8"))
    if note["summary"] is None:
        return None
    return ShardColumns(summary=ShardSummary(**note["summary"]), **note["columns"])


def _outcome(task: ShardTask, note: dict[str, Any], *, built: bool, error: str | None = None) -> ShardOutcome:
    num_samples = note["summary"]["num_samples"] if note["summary"] else 0
    return ShardOutcome(
        num_utterances=len(task.line),
        num_refused=len(note["refused"]),
        num_warnings=len(note["warnings"]),
        speech_seconds=num_samples / task.options.rate_hz,
        built=built,
        peak_bytes=_peak_bytes(),
        error=error,
    )


def _peak_bytes() -> int:
    """Returns the most memory this process ever held; getrusage would count the parent's share from before exec."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _read_lines(task: ShardTask) -> Iterator[bytes]:
    with open(task.manifest, "rb") as file:
        for offset in task.offset:
            file.seek(int(offset))
            yield file.readline()


def _fingerprint(task: ShardTask, lines: list[bytes]) -> str:
    """Hashes all that the shard is made from; audio counts by size and time of change, as in make."""
    vocabulary = "".join(sorted(task.options.vocabulary)) if task.options.vocabulary is not None else None
    options = [FORMAT_VERSION, task.options.rate_hz, task.options.encoding, vocabulary, LONG_SECONDS]
    digest = hashlib.sha256(json.dumps(options).encode())
    directory = os.path.dirname(task.manifest)
    stamps: dict[str, tuple[int, int] | None] = {}  # neighbours often lie in one archive
    for number, line in zip(task.line, lines, strict=True):
        source = os.path.join(directory, parse_utterance(line).audio)
        in_tar = split_tar_source(source)
        file = in_tar[0] if in_tar else source
        if file not in stamps:
            stamps[file] = _stamp(file)
        digest.update(f"{number} {stamps[file]} ".encode())
        digest.update(line.strip() + b"\n")
    return digest.hexdigest()


def _stamp(file: str) -> tuple[int, int] | None:
    """Returns (bytes, time of change in ns), None where there is no such file."""
    try:
        state = os.stat(file)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def _load_note(task: ShardTask, fingerprint: str) -> dict[str, Any] | None:
    """Returns the note where the finished shard can be kept."""
    try:
        note = json.loads(task.note_path.read_text(encoding="utf-8"))
        if note["fingerprint"] != fingerprint:
            return None
        summary = note["summary"]
        if summary is None:
            return note
        if task.shard_path.stat().st_size != summary["bytes"]:
            return None
        if task.verify and sync_and_hash(task.shard_path) != summary["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note


def _make_shard(task: ShardTask, lines: list[bytes], fingerprint: str) -> dict[str, Any]:
    """Decodes, checks, resamples and writes; a void note goes first, the new one comes when the shard is durable."""
    _remove_void_note(task, fingerprint)
    writer, columns = ShardWriter(task.shard_path, task.split, task.options.encoding), ColumnCollector()
    refused: list[dict[str, Any]] = []
    warnings: list[dict[str, Any]] = []
    try:
        for number, line in zip(task.line.tolist(), lines, strict=True):
            utterance = parse_utterance(line)
            try:
                record, remarks = make_record(utterance, os.path.dirname(task.manifest), task.options)
            except UserError as error:
                refused.append({"line": number, "id": utterance.id, "reason": str(error)})
                if task.strict:
                    writer.abort()
                    return {"summary": None, "refused": refused, "warnings": warnings}
                continue
            warnings.extend({"line": number, "id": utterance.id, "warning": remark} for remark in remarks)
            writer.write(record)
            columns.add(record)
        summary = writer.commit()
    except BaseException:
        writer.abort()
        raise
    if summary is None:
        task.shard_path.unlink(missing_ok=True)
    note = {
        "fingerprint": fingerprint,
        "summary": None if summary is None else dataclasses.asdict(summary),
        "columns": None if summary is None else _plain_columns(columns.finish(summary)),
        "refused": refused,
        "warnings": warnings,
    }
    _write_note(task.note_path, note)
    return note


def _remove_void_note(task: ShardTask, fingerprint: str) -> None:
    """Removes a note of other lines, audio or options; one of the same may be another worker's, who was faster."""
    try:
        void = json.loads(task.note_path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        void = True
    if void:
        task.note_path.unlink(missing_ok=True)


def _write_note(path: pathlib.Path, note: dict[str, Any]) -> None:
    """Writes a note all at once, not waiting for the disk: a note that a power cut takes costs only its shard's work."""
    temporary = temporary_beside(path)
    temporary.write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _plain_columns(columns: ShardColumns) -> dict[str, Any]:
    return {name: value for name, value in vars(columns).items() if name != "summary"}


def make_record(utterance: Utterance, directory: str, options: PrepareOptions) -> tuple[Record, list[str]]:
    """Returns one utterance's record and the warnings on it; UserError with the reason where it must be refused."""
    remarks = []
    normalized = normalize_transcript(utterance.text or "")
    if utterance.text is not None:
        if not normalized:
            remarks.append("text: no letter or digit in it")
        if options.vocabulary is not None:
            outside = sorted(set(normalized) - options.vocabulary)
            if outside:
                raise UserError(f"text holds {', '.join(map(repr, outside[:8]))} outside the vocabulary")
    try:
        clip = read_audio(os.path.join(directory, utterance.audio))
        remarks.extend(f"{warning.kind}: {warning.message}" for warning in check_audio(clip))
    except (UserError, OSError, ValueError) as error:
        # The report goes along with the corpus: it names files as the manifest does.
        raise UserError(str(error).replace(os.path.join(directory, ""), "", 1)) from None
    if len(normalized) > FAST_CHARACTERS_PER_SECOND * max(clip.seconds, 1.0):
        remarks.append(f"text: {len(normalized)} characters in {clip.seconds:.1f} s are more than anybody speaks")
    if clip.seconds > LONG_SECONDS:
        remarks.append(f"long: {clip.seconds:.1f} s is more than training takes ({LONG_SECONDS:.0f} s)")
    waveform = to_int16(convert_rate(clip, options.rate_hz))
    if len(waveform) > _MAX_SAMPLES:
        raise UserError(f"{utterance.audio}: {len(waveform)} samples are too many for one record; cut it into pieces")
    record = Record(
        id=utterance.id,
        text=utterance.text,
        speaker=utterance.speaker,
        language=utterance.language,
        instruct=utterance.instruct,
        rate_hz=options.rate_hz,
        waveform=waveform,
    )
    return record, remarks
