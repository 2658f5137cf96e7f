"""The F0 of one shard of a prepared corpus, made whole or not at all: what a worker of `cv2jax f0` does.

    CORPUS/f0/train-00000.values       float32 (little-endian): the F0 of the shard's utterances behind one another
    CORPUS/f0/.notes/train-00000.json  which audio and options they come from, counts, size and sha256

An utterance of n samples has n // hop values, so that the corpus's own index says where each begins. A shard whose note
agrees with the audio shard and the options is kept, any other is made again. Workers import neither jax nor scipy.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import numpy as np

from cv2jax.audio.f0 import fundamental_frequency
from cv2jax.data.corpus_index import write_bytes, write_json
from cv2jax.data.shards import Split

F0_DIRECTORY, INDEX, NOTES = "f0", "index.json", ".notes"
F0_VERSION = 1
F0_DTYPE = np.dtype("<f4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class F0Task:
    """One audio shard (`source` is its sha256), the rows of its split that it holds, and how their F0 is found."""

    root: str
    split: Split
    shard: str
    source: str
    first_row: int
    num_records: int
    rate_hz: int
    hop_length: int
    method: str
    verify: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the values."""
        names = ("source", "first_row", "num_records", "rate_hz", "hop_length", "method")
        return {"version": F0_VERSION} | {name: getattr(self, name) for name in names}

    @property
    def values_path(self) -> pathlib.Path:
        """Where the values go."""
        return pathlib.Path(self.root, F0_DIRECTORY, pathlib.Path(self.shard).stem + ".values")

    @property
    def note_path(self) -> pathlib.Path:
        """Where the note goes."""
        return pathlib.Path(self.root, F0_DIRECTORY, NOTES, pathlib.Path(self.shard).stem + ".json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class F0Outcome:
    """What index.json says of one shard, and what it cost if it was made now (0 where it was kept)."""

    note: dict[str, Any]
    built: bool
    speech_seconds: float
    cpu_seconds: float


def build_f0(task: F0Task) -> F0Outcome:
    """Makes the values and the note of one shard, unless both are there and agree with the task."""
    note = _load_note(task)
    if note is not None:
        return F0Outcome(note=note, built=False, speech_seconds=0.0, cpu_seconds=0.0)
    # From here on the old index would lie; it comes back when every shard is in place.
    pathlib.Path(task.root, F0_DIRECTORY, INDEX).unlink(missing_ok=True)
    start = time.process_time()
    tracks, num_samples = [], 0
    for row in range(task.first_row, task.first_row + task.num_records):
        waveform = task.split.read(row).waveform
        num_samples += len(waveform)
        samples = waveform.astype(np.float64) / 32768.0
        tracks.append(fundamental_frequency(samples, task.rate_hz, task.hop_length, method=task.method))
    data = np.concatenate(tracks).astype(F0_DTYPE).tobytes()
    write_bytes(task.values_path, data)
    note = task.identity | {
        "file": task.values_path.name,
        "split": task.split.name,
        "num_frames": sum(map(len, tracks)),
        "num_voiced": sum(int(np.count_nonzero(track)) for track in tracks),
        "num_unvoiced_utterances": sum(not track.any() for track in tracks),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(task.note_path, note)
    seconds = num_samples / task.rate_hz
    return F0Outcome(note=note, built=True, speech_seconds=seconds, cpu_seconds=time.process_time() - start)


def _load_note(task: F0Task) -> dict[str, Any] | None:
    """The note of a finished shard; None where it, or what it tells of, is not there, not whole or of something else."""
    try:
        note = json.loads(task.note_path.read_text(encoding="utf-8"))
        same = {name: note[name] for name in task.identity} == task.identity
        whole = task.values_path.stat().st_size == note["bytes"] == note["num_frames"] * F0_DTYPE.itemsize
        if same and whole and task.verify:
            whole = hashlib.sha256(task.values_path.read_bytes()).hexdigest() == note["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if same and whole else None
