"""The measurements of `cv2jax bench`, each run as `python -m cv2jax.jobs.bench_parts PART OPTIONS PLACE`.

Warm-up (compilation, first batches) is left out of every figure, and every timed span ends when the device has finished.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import soundfile
from absl import flags

from cv2jax.config import UserError, load_config, override, validate
from cv2jax.data.benchmark import benchmark_index, benchmark_loader
from cv2jax.data.plan import make_plan
from cv2jax.data.shards import Corpus
from cv2jax.jobs.bench_lm import measure_lm_decode, measure_lm_train
from cv2jax.jobs.bench_options import BenchOptions, Measurement
from cv2jax.jobs.bench_overhead import measure_overhead
from cv2jax.models.speech_tokenizer.config import official, tiny
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params, make_encoder
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.tasks import make_task
from cv2jax.text.characters import CharacterVocabulary
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps

_RATE_HZ = 22050  # of made-up files: LJSpeech's, so that prepare has to resample
_CLIP_SECONDS = 10.0  # of a waveform that is encoded
_WORKERS = (0, 1, 2)  # worker processes of the loader that are compared
_MEGABYTE = 1 << 20
_PREPARED = re.compile(r"in (?P<wall>[\d.]+) s: .* on (?P<workers>\d+) workers.* worker (?P<memory>\d+) MiB")


def measure(part: str, options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """The figures of one part; scratch files go to `place`."""
    name, _, size = part.partition(":")
    if name == "encode":
        return measure_encode(options, size)
    if name in ("lm-train", "lm-decode", "overhead"):
        measures = {"lm-train": measure_lm_train, "lm-decode": measure_lm_decode, "overhead": measure_overhead}
        return [make_measurement(name, *figure) for figure in measures[name](options, place)]
    parts: dict[str, Callable[[BenchOptions, pathlib.Path], list[Measurement]]] = {
        "corpus": make_corpus,
        "prepare": measure_prepare,
        "train": measure_train,
        "loader": measure_loader,
        "index": measure_index,
    }
    return parts[name](options, place)


def measure_prepare(options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """Speech prepared in real time per core: decoding, resampling, FLAC, hashing; all worker processes at work."""
    manifest = options.manifest or write_speech(place, options.seconds or 1200.0)
    runs = [_prepare(manifest, place / f"prepared-{i}") for i in range(options.repeats)]
    workers, memory = runs[0].workers, max(run.worker_mb for run in runs)
    case = f"{runs[0].speech_seconds:.0f} s of speech, {workers} workers, memory of the largest"
    speeds = [run.speech_seconds / run.wall_seconds for run in runs]
    return [
        make_measurement("prepare", f"{case}, per core", "x realtime", [speed / workers for speed in speeds], memory),
        make_measurement("prepare", case, "x realtime", speeds, memory),
    ]


def measure_encode(options: BenchOptions, size: str) -> list[Measurement]:
    """Speech encoded in real time, random weights, from waveforms in memory to tokens in memory."""
    config = {"tiny": tiny, "official": official}[size]()
    params = jax.jit(lambda: nn.unbox(init_encoding_params(config, jax.random.key(0))))()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    on_cpu = jax.default_backend() == "cpu"
    # One clip is enough where it takes seconds, and far too little where it takes a millisecond.
    default = (120.0 if size == "tiny" else _CLIP_SECONDS) if on_cpu else 1200.0
    num_clips = max(1, round((options.seconds or default) / _CLIP_SECONDS))
    clips = [make_speech(i, round(_CLIP_SECONDS * 16000), 16000) for i in range(num_clips)]
    encoders = {}
    for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
        encoders[dtype] = make_encoder(config, params, batch_seconds=num_clips * _CLIP_SECONDS, compute_dtype=dtype)
        encoders[dtype](clips)
    values: dict[str, list[float]] = {dtype: [] for dtype in encoders}
    for _ in range(options.repeats):
        for dtype, encoder in encoders.items():
            start = time.perf_counter()
            encoder(clips)
            values[dtype].append(num_clips * _CLIP_SECONDS / (time.perf_counter() - start))
    case = f"{size} ({count / 1e6:.1f} M parameters), batch of {num_clips} x {_CLIP_SECONDS:g} s"
    return [make_measurement("encode", f"{case}, {dtype}", "x realtime", values[dtype]) for dtype in encoders]


def measure_train(options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """Training steps a second with the loader running, evaluation and checkpoints left out."""
    name = f"speech_tokenizer_{options.size or 'tiny'}"
    config = override(load_config(name), [f"data.corpus={options.corpus}"])
    validate(config)
    task, mesh = make_task(config), make_mesh(config.mesh)
    abstract, shardings = abstract_state(task.init_state, mesh)
    state = make_state(task.init_state, shardings, jax.random.key(0))
    steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
    num_steps, warmup = (10, 2) if jax.default_backend() == "cpu" else (100, 10)
    rate_hz, key = Corpus(config.data.corpus).rate_hz, jax.random.key(1)
    figures: dict[str, list[float]] = {"steps/s": [], "utterances/s": [], "x realtime": []}
    begin, utterances, samples = 0.0, 0, 0
    for step, batch_size, local in task.batches(0, warmup + num_steps * options.repeats, mesh):
        if step == warmup:
            jax.block_until_ready(state)
            begin, utterances, samples = time.perf_counter(), 0, 0
        with jax.set_mesh(mesh), axis_rules():
            batch = global_batch(mesh, local, batch_size)
            state, _ = steps.for_batch(batch)(state, batch, key)
        utterances, samples = utterances + batch_size, samples + int(local["num_samples"].sum())
        if step >= warmup and (step + 1 - warmup) % num_steps == 0:
            jax.block_until_ready(state)
            seconds = time.perf_counter() - begin
            figures["steps/s"].append(num_steps / seconds)
            figures["utterances/s"].append(utterances / seconds)
            figures["x realtime"].append(samples / rate_hz / seconds)
            begin, utterances, samples = time.perf_counter(), 0, 0
    dtype, count = task.model_config.dtype, sum(leaf.size for leaf in jax.tree.leaves(state.params))
    case = f"{config.name} ({count / 1e6:.2f} M parameters), {config.data.batch_seconds:g} s a batch, {dtype}"
    return [make_measurement("train", case, unit, values) for unit, values in figures.items()]


def measure_loader(options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """Utterances a second and worker, decoded from shards into batches, for 0, 1 and 2 worker processes in turn."""
    corpus = Corpus(options.corpus)
    split = corpus.split("train")
    data = load_config("speech_tokenizer_tiny").data
    plan = make_plan(
        split.num_samples,
        split.num_characters,
        rate_hz=corpus.rate_hz,
        seed=0,
        batch_seconds=data.batch_seconds,
        batch_multiple=data.batch_multiple,
        num_buckets=data.num_buckets,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        require_text=True,
        cache_dir=place,
    )
    encode_text = CharacterVocabulary.from_counts(split.characters).encode
    values: dict[int, list[float]] = {workers: [] for workers in _WORKERS}
    memory: dict[int, list[float]] = {workers: [] for workers in _WORKERS}
    for _ in range(options.repeats):
        for workers in _WORKERS:
            with _ChildrenPeak() as children:
                report = benchmark_loader(
                    split, plan, encode_text, num_batches=20, num_workers=workers, num_threads=2, prefetch=4
                )
            values[workers].append(report.utterances_per_second_per_worker)
            memory[workers].append(children.peak_mb if workers else _peak_mb())
    where = {workers: f"{workers} worker processes, memory of the largest" for workers in _WORKERS}
    where[0] = "2 threads of the main process"
    unit = "utterances/s per worker"
    return [make_measurement("loader", where[w], unit, values[w], max(memory[w])) for w in _WORKERS]


def measure_index(options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """From a synthetic index on disk to the first batch, once: seconds, and resident memory of the whole process."""
    report = benchmark_index(options.utterances, directory=place)
    case = f"synthetic index of {options.utterances:,} utterances"
    memory = report.peak_resident_mb
    return [
        make_measurement("loader", f"{case}: first batch, plan included", "s", [report.first_batch_seconds], memory),
        make_measurement("loader", f"{case}: plan", "s", [report.plan_seconds], memory),
        make_measurement("loader", f"{case}: peak resident", "MB", [memory], memory),
    ]


def make_speech(seed: int, num_samples: int, rate_hz: int) -> np.ndarray:
    """Something as hard to compress as speech, float32 [W]: harmonics of a gliding pitch, syllables, a little noise."""
    generator = np.random.default_rng(seed)
    seconds = np.arange(num_samples, dtype=np.float32) / rate_hz
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.4 * seconds + seed), dtype=np.float64) / rate_hz
    voice = sum(np.sin(h * phase) / h for h in (1, 2, 3, 5, 8))
    loudness = 0.15 * np.abs(np.sin(2 * np.pi * 2.1 * seconds))
    return (loudness * (voice + 0.1 * generator.standard_normal(num_samples))).astype(np.float32)


def write_speech(place: pathlib.Path, seconds: float) -> pathlib.Path:
    """Writes about `seconds` of made-up utterances (lognormal, 5 s) with texts, and their manifest, which it returns."""
    generator, total, lines = np.random.default_rng(0), 0.0, []
    (place / "audio").mkdir()
    while total < seconds or len(lines) < 80:
        length = float(np.clip(generator.lognormal(np.log(5.0), 0.4), 1.0, 20.0)) if total < seconds else 1.0
        name = f"u{len(lines):05d}"
        soundfile.write(
            place / "audio" / f"{name}.wav", make_speech(len(lines), int(length * _RATE_HZ), _RATE_HZ), _RATE_HZ
        )
        text = "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz   "), max(1, int(12 * length))))
        row = {"id": name, "audio": f"audio/{name}.wav", "text": f"a{text}", "speaker": "s", "language": "en"}
        lines.append(json.dumps(row | {"split": "test" if len(lines) % 10 == 9 else "train"}))
        total += length
    manifest = place / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def make_corpus(options: BenchOptions, place: pathlib.Path) -> list[Measurement]:
    """Makes the corpus `prepared` that train and loader read, in a process of its own for the sake of their memory."""
    _prepare(write_speech(place, options.seconds or 900.0), place / "prepared")
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    speech_seconds: float
    wall_seconds: float
    workers: int
    worker_mb: float


def _prepare(manifest: str | pathlib.Path, out: pathlib.Path) -> _Prepared:
    """Runs the verb `prepare` (jobs do not import jobs) and reads the last line it prints."""
    command = [sys.executable, "-m", "cv2jax.cli.main", "prepare", str(manifest), str(out)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise UserError(f"cv2jax prepare {manifest} failed with exit code {process.returncode}")
    found = _PREPARED.search(process.stdout)
    if found is None:
        raise RuntimeError(f"cv2jax prepare printed no figures: {process.stdout!r}")
    splits = Corpus(out).index["splits"].values()
    return _Prepared(
        speech_seconds=sum(split["seconds"] for split in splits),
        wall_seconds=float(found["wall"]),
        workers=int(found["workers"]),
        worker_mb=float(found["memory"]),
    )


def make_measurement(bench: str, case: str, unit: str, values: list[float], memory: float | None = None) -> Measurement:
    """A measurement with this process's peak memory (unless `memory` says another's) and the device's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    device = stats.get("peak_bytes_in_use")
    return Measurement(
        bench=bench,
        case=case,
        unit=unit,
        values=tuple(round(value, 4) for value in values),
        peak_memory_mb=round(_peak_mb() if memory is None else memory, 1),
        device_memory_mb=None if device is None else round(device / _MEGABYTE, 1),
    )


def _peak_mb(process: int | str = "self") -> float:
    """Peak resident memory of a process; `ru_maxrss`, the fallback, starts from that of the process that started it."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        who = resource.RUSAGE_SELF if process == "self" else resource.RUSAGE_CHILDREN
        return resource.getrusage(who).ru_maxrss / (_MEGABYTE if sys.platform == "darwin" else 1024)


class _ChildrenPeak:
    """Watches the child processes that live while it is entered; `peak_mb` is the peak of the largest."""

    def __enter__(self) -> "_ChildrenPeak":
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            peaks = [_peak_mb(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
            self.peak_mb = max([self.peak_mb, *peaks])


def describe_machine() -> dict[str, Any]:
    """Devices and versions, for the report."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def main(arguments: list[str]) -> int:
    """Measures one part and leaves `PLACE/result.json`; 2 after a user's mistake, said on stderr."""
    part, options, place = arguments[0], BenchOptions(**json.loads(arguments[1])), pathlib.Path(arguments[2])
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers ask for it
    try:
        measurements = measure(part, options, place)
    except UserError as error:
        print(f"bench {part}: {error}", file=sys.stderr)
        return 2
    result = {"machine": describe_machine(), "measurements": [dataclasses.asdict(m) for m in measurements]}
    temporary = place / "result.tmp"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, place / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
