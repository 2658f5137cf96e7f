import errno
import gc
import os
import pathlib
import pickle
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.benchmark import synthetic_lengths
from cv2jax.data.order_file import LeftOut
from cv2jax.data.plan import Plan, make_plan

RATE_HZ = 16000


def plan_of(num_samples: np.ndarray, text: np.ndarray | None = None, **options: Any) -> Plan:
    defaults: dict[str, Any] = {
        "rate_hz": RATE_HZ,
        "seed": 1,
        "batch_seconds": 60.0,
        "batch_multiple": 4,
        "num_buckets": 4,
        "min_seconds": 0.1,
        "max_seconds": 30.0,
        "require_text": False,
    }
    text = np.full(len(num_samples), 5, np.int32) if text is None else text
    return make_plan(num_samples, text, **(defaults | options))


def lengths(count: int, seed: int = 0) -> np.ndarray:
    seconds = np.random.default_rng(seed).lognormal(1.2, 0.6, count).clip(0.2, 29.0)
    return (seconds * RATE_HZ).astype(np.int32)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(lengths(999))


def epoch_rows(plan: Plan, epoch: int) -> list[np.ndarray]:
    first = epoch * plan.num_batches
    return [plan.batch(step)[2] for step in range(first, first + plan.num_batches)]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_shows_every_utterance_and_repeats_only_to_fill(plan: Plan, epoch: int) -> None:
    shown = np.bincount(np.concatenate(epoch_rows(plan, epoch)), minlength=999)
    assert shown.min() == 1
    assert shown.max() <= 2
    assert (shown - 1).sum() == plan.stats.num_repeated


def test_rows_fit_their_bucket_and_shapes_are_static(plan: Plan) -> None:
    num_samples = lengths(999)
    shapes = set()
    for step in range(plan.num_batches):
        epoch, bucket_id, rows = plan.batch(step)
        bucket = plan.buckets[bucket_id]
        assert epoch == 0
        assert len(rows) == bucket.batch_size
        assert num_samples[rows].max() <= bucket.num_samples
        if bucket_id:
            assert num_samples[rows].min() > plan.buckets[bucket_id - 1].num_samples
        shapes.add((bucket.num_samples, bucket.num_text, bucket.batch_size))
    assert len(shapes) == len(plan.buckets) == 4
    assert all(bucket.num_samples % 640 == 0 and bucket.batch_size % 4 == 0 for bucket in plan.buckets)


def test_the_last_batch_of_a_bucket_wraps_to_the_start_of_its_order() -> None:
    plan = plan_of(np.full(10, RATE_HZ, np.int32), batch_seconds=4.0, num_buckets=1)
    # Batches are shuffled, so find the one that wraps: the two rows it borrows open another batch, in order.
    batches = [rows.tolist() for rows in epoch_rows(plan, 3)]
    (wrapped,) = [b for b in batches if any(b[2:] == other[:2] for other in batches if other is not b)]
    assert plan.stats.num_repeated == 2
    assert sorted({row for b in batches for row in b}) == list(range(10))
    assert len(set(wrapped)) == 4


def test_fewer_utterances_than_a_batch_repeat_in_turn() -> None:
    plan = plan_of(np.full(3, RATE_HZ, np.int32), batch_multiple=8)
    _, _, rows = plan.batch(5)
    assert len(rows) == 8
    assert rows.tolist() == [*rows[:3], *rows[:3], *rows[:2]]
    assert plan.evaluation_batch(0)[2].tolist() == [True] * 3 + [False] * 5


def test_order_is_a_pure_function_of_seed_and_step(plan: Plan) -> None:
    again = plan_of(lengths(999))
    assert again.hash == plan.hash
    for step in (1234, 0, 56):
        left, right = plan.batch(step), again.batch(step)
        assert left[:2] == right[:2]
        np.testing.assert_array_equal(left[2], right[2])


def test_seeds_and_epochs_differ(plan: Plan) -> None:
    other = plan_of(lengths(999), seed=2)
    assert other.hash != plan.hash
    orders = [np.concatenate(epoch_rows(p, e)).tolist() for p, e in ((plan, 0), (plan, 1), (other, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # Neither the sequence of shapes nor the company an utterance keeps stays from one epoch to the next.
    sequences = [[plan.batch(s)[1] for s in range(e * plan.num_batches, (e + 1) * plan.num_batches)] for e in (0, 1)]
    assert sequences[0] != sequences[1]
    companies = [{frozenset(rows.tolist()) for rows in epoch_rows(plan, e)} for e in (0, 1)]
    assert not companies[0] & companies[1]


def test_hash_tells_corpora_with_one_histogram_apart() -> None:
    assert plan_of(lengths(50)).hash != plan_of(lengths(50)[::-1].copy()).hash


def test_evaluation_shows_each_utterance_once_in_fixed_order(plan: Plan) -> None:
    shown = []
    for bucket_id, rows, row_mask in plan.evaluation_batches():
        assert len(rows) == len(row_mask) == plan.buckets[bucket_id].batch_size
        assert (np.diff(rows[row_mask]) > 0).all()
        shown.extend(rows[row_mask].tolist())
    assert sorted(shown) == list(range(999))
    with pytest.raises(IndexError, match="evaluation batch"):
        plan.evaluation_batch(plan.num_batches)


def test_left_out_rows_are_counted_and_never_shown() -> None:
    num_samples = np.array([100, 1600, 16_000, 480_000, 480_001, 0, 8000], np.int32)
    text = np.array([5, 5, 0, 5, 5, 5, 9], np.int32)
    plan = plan_of(num_samples, text, require_text=True, batch_multiple=1)
    assert plan.stats.left_out == LeftOut(num_too_short=2, num_too_long=1, num_without_text=1, num_with_too_much_text=0)
    assert plan.stats.num_utterances == 3
    assert {row for rows in epoch_rows(plan, 0) for row in rows.tolist()} == {1, 3, 6}
    assert "2 too short, 1 too long, 1 without text" in plan.table()
    assert plan_of(num_samples, text, require_text=False, batch_multiple=1).stats.num_utterances == 4
    assert max(bucket.num_text for bucket in plan.buckets) == 16


def test_text_that_nobody_can_have_spoken_is_left_out_and_shapes_nothing() -> None:
    num_samples = np.array([8000, 8000, 32_000, 32_000], np.int32)  # half a second counts as one
    text = np.array([50, 51, 100, 100_000], np.int32)
    plan = plan_of(num_samples, text, batch_multiple=1)
    assert plan.stats.left_out.num_with_too_much_text == 2
    assert sorted({row for rows in epoch_rows(plan, 0) for row in rows.tolist()}) == [0, 2]
    assert max(bucket.num_text for bucket in plan.buckets) == 104
    with pytest.raises(UserError, match=r"4 with too much text\): check its texts, or raise data.max_characters"):
        plan_of(num_samples, text, max_characters_per_second=0.5)


def test_padding_share_counts_the_zeros() -> None:
    plan = plan_of(np.array([16_000, 32_000] * 4, np.int32), num_buckets=1)
    assert plan.stats.padding_share == pytest.approx(0.25)
    assert "25.0% padding" in plan.table()
    assert (
        plan_of(np.array([16_000, 32_000] * 40, np.int32), num_buckets=2, batch_seconds=20.0).stats.padding_share == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"min_seconds": 29.5, "name": "test"},
            r"^split test: no utterance of 999 .*999 too short.*\): lower data\.min_seconds=29\.5$",
        ),
        ({"max_seconds": 0.15}, r"999 too long.*\): raise data\.max_seconds=0\.15$"),
        (
            {"require_text": True},
            r"^no utterance of 999 is left.*999 without text, 0 .*\): prepare it with transcripts$",
        ),
        ({"rate_hz": 16_010}, "40 ms"),
        ({"num_buckets": 0}, "buckets"),
    ],
)
def test_impossible_plans_are_user_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(lengths(999), np.zeros(999, np.int32), **options)
    with pytest.raises(UserError, match="is left"):
        plan_of(np.zeros(0, np.int32))


def test_negative_steps_and_unequal_columns_are_errors(plan: Plan) -> None:
    with pytest.raises(ValueError, match="step -1"):
        plan.batch(-1)
    with pytest.raises(Exception, match=r"text_lengths|text lengths"):
        plan_of(lengths(5), np.zeros(4, np.int32))


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where orders go without a `cache_dir`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"cv2jax-{os.getuid()}"


def orders(cache: pathlib.Path) -> list[pathlib.Path]:
    return sorted(cache.glob("order-*"))


def test_a_plan_pickles_as_a_path(cache: pathlib.Path) -> None:
    plan = plan_of(lengths(50_000))
    data = pickle.dumps(plan)
    assert len(data) < 3000
    np.testing.assert_array_equal(pickle.loads(data).batch(9)[2], plan.batch(9)[2])


def test_equal_plans_share_one_file(cache: pathlib.Path) -> None:
    first = plan_of(lengths(200))
    (path,) = orders(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == 4 * 200
    os.utime(path, (1, 1))
    inode = path.stat().st_ino
    second = plan_of(lengths(200))
    assert orders(cache) == [path]
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 1
    np.testing.assert_array_equal(first.batch(3)[2], second.batch(3)[2])
    plan_of(lengths(200)[::-1].copy())  # the same buckets and other rows in them
    assert len(orders(cache)) == 2


def test_a_file_of_another_size_is_written_again(cache: pathlib.Path) -> None:
    before = plan_of(lengths(200)).batch(3)[2]
    orders(cache)[0].write_bytes(b"half")
    np.testing.assert_array_equal(plan_of(lengths(200)).batch(3)[2], before)


_PLAN_SCRIPT = """
import sys, time
import numpy as np
from cv2jax.data import order_file, plan
sort = order_file._sort_rows
def slowly(*arguments):
    time.sleep(1)
    sort(*arguments)
    print("wrote")
order_file._sort_rows = slowly
ones = np.ones(300_000, np.int32)
options = dict(batch_seconds=60.0, batch_multiple=4, num_buckets=4, min_seconds=0.1, require_text=False)
print("ready", flush=True)
sys.stdin.readline()
order = plan.make_plan(ones * 16_000, ones, rate_hz=16_000, seed=0, **options)
print(int(order.batch(1)[2].sum()), order._path.stat().st_ino)
"""


def test_processes_that_start_together_write_once(cache: pathlib.Path) -> None:
    environment = {**os.environ, "TMPDIR": str(cache.parent)}
    command = [sys.executable, "-c", _PLAN_SCRIPT]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        for process in (one, two):
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60)[0].split() for process in (one, two)]
    assert said[0][-2:] == said[1][-2:] != []
    assert said[0].count("wrote") + said[1].count("wrote") == 1
    assert [path.suffix for path in orders(cache)] == [".u32"]


def test_orders_not_used_lately_are_forgotten_and_mapped_ones_kept(cache: pathlib.Path) -> None:
    mapped = plan_of(lengths(30))
    (oldest,) = orders(cache)
    os.utime(oldest, (1, 1))
    old = cache / "order-old.u32"
    recent = [cache / f"order-{i}.u32" for i in range(9)]
    unfinished = cache / "order-killed.tmp"
    for i, path in enumerate([old, unfinished, *recent]):
        path.write_bytes(b"")
        if path in recent:
            os.utime(path, (time.time() - i,) * 2)
        else:
            os.utime(path, (1, 1))
    (cache / "order-busy.tmp").write_bytes(b"")
    plan_of(lengths(31))
    left = orders(cache)
    assert oldest in left
    assert not {old, unfinished, *recent[7:]} & set(left)
    assert {cache / "order-busy.tmp", *recent[:7]} <= set(left)
    del mapped
    gc.collect()
    plan_of(lengths(32))
    assert oldest not in orders(cache)


def test_order_files_share_a_directory_without_meeting(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "new" / "cache"
    first = plan_of(lengths(200), cache_dir=place)
    second = plan_of(lengths(200, seed=1), cache_dir=place)
    third = plan_of(lengths(200), cache_dir=place)
    assert [path.suffix for path in orders(place)] == [".u32", ".u32"]
    np.testing.assert_array_equal(first.batch(3)[2], third.batch(3)[2])
    assert second.hash != first.hash


def test_an_order_that_cannot_be_written_is_a_user_error(
    tmp_path: pathlib.Path, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache: cannot write the data order"):
        plan_of(lengths(20), cache_dir=tmp_path / "file" / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(UserError, match=rf"{cache}: cannot .*No space left on device; it takes 0.0 MiB.*TMPDIR"):
            plan_of(lengths(20))
    assert orders(cache) == []
    (cache / "lock").unlink()
    cache.rmdir()
    cache.symlink_to(tmp_path)  # as another user of the host could have made it
    with pytest.raises(UserError, match=rf"{cache}: cannot .*not a directory of this user.*TMPDIR"):
        plan_of(lengths(20))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing" / "\0"))
    cache.unlink()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan_of(lengths(999))
    monkeypatch.setattr("cv2jax.data.order_file._CHUNK", 100)
    cut = plan_of(lengths(999))
    assert cut.stats == whole.stats
    assert cut.buckets == whole.buckets
    for step in range(5):
        np.testing.assert_array_equal(cut.batch(step)[2], whole.batch(step)[2])


def test_memory_does_not_grow_with_the_corpus(tmp_path: pathlib.Path) -> None:
    num_samples, num_characters = synthetic_lengths(5_000_000, 0, tmp_path)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        plan = plan_of(num_samples, num_characters, rate_hz=24000, cache_dir=tmp_path, require_text=True)
        rows = plan.batch(plan.num_batches * 3 + 5)[2]
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.max() < 5_000_000
    assert seconds < 20
    # The chunks of 2 million rows, whatever the corpus; one Python integer a row would be 160 MB.
    assert peak < 130e6
