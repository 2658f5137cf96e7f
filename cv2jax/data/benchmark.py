"""How fast the loader is, and whether the plan of a huge corpus stays small: figures for `cv2jax bench loader`."""

import dataclasses
import itertools
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np
from jaxtyping import Int32

from cv2jax.data.batch import EncodeText
from cv2jax.data.loader import ReadsRows, make_loader
from cv2jax.data.plan import Plan, make_plan
from cv2jax.data.shards import Record

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderReport:
    """Throughput of a loader after its first batch, and how long that took."""

    num_workers: int
    num_threads: int
    num_utterances: int
    first_batch_seconds: float
    seconds: float
    speech_seconds: float

    @property
    def utterances_per_second(self) -> float:
        """Utterances a second, all workers together."""
        return self.num_utterances / self.seconds

    @property
    def utterances_per_second_per_worker(self) -> float:
        """Utterances a second and worker process (the main process counts as one when there are none)."""
        return self.utterances_per_second / max(self.num_workers, 1)

    def __str__(self) -> str:
        return (
            f"{self.utterances_per_second:.1f} utterances/s ({self.utterances_per_second_per_worker:.1f} per worker),"
            f" {self.speech_seconds / self.seconds:.0f} s of speech a second, {self.num_workers} workers,"
            f" {self.num_threads} threads each, first batch after {self.first_batch_seconds:.2f} s"
        )


def benchmark_loader(
    split: ReadsRows,
    plan: Plan,
    encode_text: EncodeText,
    *,
    num_batches: int,
    num_workers: int,
    num_threads: int,
    prefetch: int,
) -> LoaderReport:
    """Times `num_batches` batches after those that may lie ready in buffers."""
    start = time.perf_counter()
    first = begin = start
    num_utterances = num_samples = 0
    with make_loader(
        split,
        plan,
        encode_text,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch=prefetch,
    ) as loader:
        warmup = loader.max_waiting + 1
        for step, batch in itertools.islice(loader, warmup + num_batches):
            if step == 0:
                first = time.perf_counter()
            if step == warmup - 1:
                begin = time.perf_counter()
            if step >= warmup:
                num_utterances += len(batch["utterance"])
                num_samples += int(batch["num_samples"].sum())
        seconds = time.perf_counter() - begin
    return LoaderReport(
        num_workers=num_workers,
        num_threads=loader.num_threads,
        num_utterances=num_utterances,
        first_batch_seconds=first - start,
        seconds=seconds,
        speech_seconds=num_samples / plan.rate_hz,
    )


def synthetic_lengths(
    num_utterances: int, seed: int, directory: str | pathlib.Path, *, rate_hz: int = 24000
) -> tuple[Int32[np.ndarray, "N"], Int32[np.ndarray, "N"]]:
    """Memory-mapped columns `num_samples` and `num_characters` of a made-up corpus: lognormal, 6 s and 14 letters/s."""
    paths = [pathlib.Path(directory) / f"{name}.npy" for name in ("num_samples", "num_characters")]
    generator = np.random.default_rng(seed)
    header = {"descr": "<i4", "fortran_order": False, "shape": (num_utterances,)}
    with paths[0].open("wb") as samples_file, paths[1].open("wb") as characters_file:
        np.lib.format.write_array_header_1_0(samples_file, header)
        np.lib.format.write_array_header_1_0(characters_file, header)
        for start in range(0, num_utterances, _CHUNK):
            count = min(_CHUNK, num_utterances - start)
            seconds = generator.lognormal(np.log(6.0), 0.7, count).clip(0.05, 120.0)
            letters = seconds * generator.normal(14.0, 2.0, count).clip(6.0, 22.0)
            samples_file.write((seconds * rate_hz).astype("<i4").tobytes())
            characters_file.write(letters.astype("<i4").tobytes())
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r")


class SilentSplit:
    """A split without shards: every row is silence of the length its column says, with as much text."""

    def __init__(
        self, num_samples: Int32[np.ndarray, "N"], num_characters: Int32[np.ndarray, "N"], rate_hz: int
    ) -> None:
        self._num_samples = num_samples
        self._num_characters = num_characters
        self._rate_hz = rate_hz

    def __len__(self) -> int:
        return len(self._num_samples)

    def read(self, row: int) -> Record:
        """Silence, and a text of the letter a."""
        return Record(
            id=str(row),
            text="a" * int(self._num_characters[row]),
            speaker="nobody",
            language="en",
            instruct=None,
            rate_hz=self._rate_hz,
            waveform=np.zeros(int(self._num_samples[row]), np.int16),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What it takes to begin on a huge corpus."""

    num_utterances: int
    plan_seconds: float
    first_batch_seconds: float  # from the index on disk to the first batch, the plan included
    peak_resident_mb: float  # of the whole process since its start
    plan: str

    def __str__(self) -> str:
        return (
            f"{self.num_utterances} utterances: plan in {self.plan_seconds:.1f} s, first batch after"
            f" {self.first_batch_seconds:.1f} s, peak resident {self.peak_resident_mb:.0f} MB\n{self.plan}"
        )


def benchmark_index(
    num_utterances: int, *, directory: str | pathlib.Path | None = None, seed: int = 0, **plan_options: Any
) -> IndexReport:
    """Makes a synthetic index in a temporary directory (inside `directory`), plans it and loads the first batch."""
    rate_hz = 24000
    options: dict[str, Any] = {
        "batch_seconds": 240.0,
        "batch_multiple": 8,
        "num_buckets": 8,
        "min_seconds": 0.1,
        "max_seconds": 30.0,
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix="cv2jax-index-") as place:
        synthetic_lengths(num_utterances, seed, place, rate_hz=rate_hz)
        start = time.perf_counter()
        num_samples, num_characters = (
            np.load(pathlib.Path(place) / f"{name}.npy", mmap_mode="r") for name in ("num_samples", "num_characters")
        )
        plan = make_plan(
            num_samples,
            num_characters,
            rate_hz=rate_hz,
            seed=seed,
            require_text=True,
            cache_dir=place,
            **(options | plan_options),
        )
        planned = time.perf_counter()
        split = SilentSplit(num_samples, num_characters, rate_hz)
        with make_loader(split, plan, _encode_letters, num_steps=1) as loader:
            next(iter(loader))
        end = time.perf_counter()
        return IndexReport(
            num_utterances=num_utterances,
            plan_seconds=planned - start,
            first_batch_seconds=end - start,
            peak_resident_mb=_peak_resident_mb(),
            plan=plan.table(),
        )


def _encode_letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)


def _peak_resident_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
