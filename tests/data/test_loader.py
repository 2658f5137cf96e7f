import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.batch import batch_hash, batch_spec
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.loader import make_evaluation_batches, make_loader
from cv2jax.data.plan import Plan, make_plan
from cv2jax.data.shards import Corpus, Record, Split
from cv2jax.data.subset import SplitSubset, spread_rows
from cv2jax.text.characters import CharacterVocabulary
from tests.data.speech_files import make_record

VOCABULARY = CharacterVocabulary.from_counts("hi you")
NUM_UTTERANCES = 61


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("loader") / "corpus"
    lengths = np.random.default_rng(0).integers(2400, 9600, NUM_UTTERANCES).tolist()
    records = [make_record(i, length) for i, length in enumerate(lengths)]
    write_corpus(path, {"train": records}, rate_hz=24000, shard_utterances=20)
    return path


@pytest.fixture(scope="module")
def split(corpus: pathlib.Path) -> Split:
    return Corpus(corpus).split("train")


@pytest.fixture(scope="module")
def plan(split: Split) -> Plan:
    return make_plan(
        split.num_samples,
        split.num_characters,
        rate_hz=24000,
        seed=3,
        batch_seconds=2.0,
        batch_multiple=4,
        num_buckets=3,
        min_seconds=0.1,
        require_text=True,
    )


@pytest.fixture(scope="module")
def hashes(split: Split, plan: Plan) -> list[tuple[int, str]]:
    """Steps 0 to 29 (more than two epochs), loaded without threads or workers."""
    with make_loader(split, plan, VOCABULARY.encode, num_steps=30, num_threads=0, prefetch=1) as loader:
        return [(step, batch_hash(batch)) for step, batch in loader]


def shared_memory() -> set[str]:
    place = pathlib.Path("/dev/shm")
    return {entry.name for entry in place.iterdir() if entry.name.startswith("psm_")} if place.is_dir() else set()


def test_batches_hold_what_the_plan_says(split: Split, plan: Plan) -> None:
    assert 2 * plan.num_batches < 30
    shapes = set()
    with make_loader(split, plan, VOCABULARY.encode, num_steps=plan.num_batches, speaker=True) as loader:
        for step, batch in loader:
            _, bucket_id, rows = plan.batch(step)
            spec = batch_spec(plan.buckets[bucket_id], speaker=True)
            assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec
            assert batch["utterance"].tolist() == rows.tolist()
            assert batch["row_mask"].all()
            assert batch["speaker"].tolist() == split.speaker[rows].tolist()
            record = split.read(int(rows[-1]))
            np.testing.assert_array_equal(batch["waveform"][-1, : len(record.waveform)], record.waveform)
            shapes.add(batch["waveform"].shape)
    assert len(shapes) == len(plan.buckets) == 3


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(split: Split, plan: Plan, hashes: list[tuple[int, str]], num_threads: int) -> None:
    with make_loader(split, plan, VOCABULARY.encode, num_steps=30, num_threads=num_threads) as loader:
        assert [(step, batch_hash(batch)) for step, batch in loader] == hashes


@pytest.mark.parametrize("start_step", [1, 13, 29])
def test_any_step_is_a_place_to_resume(
    split: Split, plan: Plan, hashes: list[tuple[int, str]], start_step: int
) -> None:
    with make_loader(split, plan, VOCABULARY.encode, start_step=start_step) as loader:
        found = [(step, batch_hash(batch)) for _, (step, batch) in zip(range(30 - start_step), loader, strict=False)]
    assert found == hashes[start_step:]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_hosts_together_load_the_same_global_batches(
    split: Split, plan: Plan, hashes: list[tuple[int, str]], num_processes: int
) -> None:
    def rows_of(process: int):
        return lambda size: np.arange(size).reshape(num_processes, -1)[process]

    loaders = [
        make_loader(split, plan, VOCABULARY.encode, num_steps=8, rows=rows_of(process), num_threads=0)
        for process in range(num_processes)
    ]
    for parts in zip(*loaders, strict=True):
        step = parts[0][0]
        names = parts[0][1]
        whole = {name: np.concatenate([part[name] for _, part in parts]) for name in names}
        assert (step, batch_hash(whole)) == hashes[step]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing_and_leave_nothing(
    split: Split, plan: Plan, hashes: list[tuple[int, str]], num_workers: int
) -> None:
    before = shared_memory()
    # An odd start and a count that is no multiple of the workers; the loader is left before its end.
    with make_loader(split, plan, VOCABULARY.encode, start_step=3, num_workers=num_workers) as loader:
        found = [(step, batch_hash(batch)) for _, (step, batch) in zip(range(13), loader, strict=False)]
    assert found == hashes[3:16]
    assert not multiprocessing.active_children()
    assert shared_memory() <= before
    assert list(loader) == []


class CountingSplit:
    """Says in a file, for each record read, that it was."""

    def __init__(self, split: Split, file: pathlib.Path) -> None:
        self._split, self._file = split, file

    def __len__(self) -> int:
        return len(self._split)

    def read(self, row: int) -> Record:
        with self._file.open("ab") as file:
            file.write(b"+")
        return self._split.read(row)


@pytest.mark.parametrize(
    ("num_workers", "num_threads", "prefetch", "max_waiting"),
    [(0, 1, 2, 2), (0, 8, 2, 2), (0, 0, 2, 0), (1, 8, 6, 6)],
)
def test_no_more_batches_wait_than_prefetch_says(
    split: Split, tmp_path: pathlib.Path, num_workers: int, num_threads: int, prefetch: int, max_waiting: int
) -> None:
    options = {"batch_multiple": 4, "num_buckets": 1, "min_seconds": 0.1, "require_text": True}
    plan = make_plan(split.num_samples, split.num_characters, rate_hz=24000, seed=0, batch_seconds=0.1, **options)
    read = tmp_path / "read"
    loader = make_loader(
        CountingSplit(split, read),
        plan,
        VOCABULARY.encode,
        num_workers=num_workers,
        num_threads=num_threads,
        prefetch=prefetch,
    )
    with loader:
        next(loader)
        deadline = time.monotonic() + 20
        while read.stat().st_size < (1 + max_waiting) * 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # it reads no further
        size = read.stat().st_size
    assert loader.max_waiting == max_waiting
    assert size == (1 + max_waiting) * 4


def test_the_memory_of_waiting_batches_is_logged(split: Split, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="absl"):
        make_loader(split, plan, VOCABULARY.encode, rows=lambda size: range(size // 2), prefetch=3).close()
    largest = max(sum(np.prod(s) * d.itemsize for s, d in batch_spec(bucket).values()) for bucket in plan.buckets)
    size = largest / 2 / 2**20
    assert caplog.messages == [f"up to {3 * size:.1f} MiB of batches wait in this process: 3 of {size:.1f} MiB"]


def test_a_killed_worker_is_reported(split: Split, plan: Plan) -> None:
    with make_loader(split, plan, VOCABULARY.encode, num_steps=200, num_workers=1, prefetch=2) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a data worker died before step \d+ .*exit code -9"):
            list(loader)
    assert not multiprocessing.active_children()


_ENDLESS_SCRIPT = """
import multiprocessing, sys, time
from cv2jax.data.loader import make_loader
from cv2jax.data.plan import make_plan
from cv2jax.data.shards import Corpus
from cv2jax.data.subset import SplitSubset, spread_rows
from cv2jax.text.characters import CharacterVocabulary

split = Corpus(sys.argv[1]).split("train")
limits = dict(batch_seconds=2.0, batch_multiple=4, num_buckets=2, min_seconds=0.1, require_text=True)
plan = make_plan(
    split.num_samples, split.num_characters, rate_hz=24000, seed=0, cache_dir=sys.argv[2], **limits
)
loader = make_loader(split, plan, CharacterVocabulary.from_counts("hi").encode, num_workers=1)
next(loader)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(60)
"""


def is_running(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_ignore_sigterm_but_do_not_outlive_a_killed_parent(
    corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [sys.executable, "-c", _ENDLESS_SCRIPT, str(corpus), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGTERM)
        time.sleep(0.3)
        assert is_running(worker)
        parent.kill()
    end = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(worker)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_one_line(
    corpus: pathlib.Path, plan: Plan, tmp_path: pathlib.Path, num_workers: int
) -> None:
    copy = tmp_path / "corpus"
    for file in corpus.rglob("*.*"):
        (copy / file.relative_to(corpus)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(corpus)).write_bytes(file.read_bytes())
    shard = copy / "shards" / "train-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    shard.write_bytes(data)
    loader = make_loader(Corpus(copy).split("train"), plan, VOCABULARY.encode, num_workers=num_workers)
    with loader, pytest.raises(UserError, match=r"train-00001.arrayrecord: record \d+ cannot be read") as raised:
        list(zip(range(plan.num_batches), loader, strict=False))
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    assert not multiprocessing.active_children()


def test_a_subset_is_loaded_like_a_split(split: Split) -> None:
    subset = SplitSubset(split, spread_rows(NUM_UTTERANCES, 7))
    plan = make_plan(
        subset.num_samples,
        subset.num_characters,
        rate_hz=24000,
        seed=0,
        batch_seconds=2.0,
        batch_multiple=4,
        num_buckets=1,
        min_seconds=0.1,
        require_text=True,
    )
    with make_evaluation_batches(subset, plan, VOCABULARY.encode) as loader:
        batches = [batch for _, batch in loader]
    assert sorted(row for batch in batches for row in batch["utterance"][batch["row_mask"]].tolist()) == list(range(7))


def test_evaluation_shows_every_utterance_once(split: Split, plan: Plan) -> None:
    shown: list[int] = []
    indices = []
    with make_evaluation_batches(split, plan, VOCABULARY.encode) as loader:
        for index, batch in loader:
            indices.append(index)
            shown.extend(batch["utterance"][batch["row_mask"]].tolist())
    assert sorted(shown) == list(range(NUM_UTTERANCES))
    assert indices == list(range(plan.num_batches))
