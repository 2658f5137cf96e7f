"""The packing plan: a pure function that loses nobody, caps that hold, full rows, a shared file."""

import errno
import os
import pathlib
import pickle
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.packing import PackingPlan, make_packing
from cv2jax.data.permutation import permute


def embedded_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Utterances of 2-4 s."""
    random = np.random.default_rng(seed)
    return (random.integers(50, 101, count) + random.integers(8, 26, count) + 2).astype(np.int32)


def emilia_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lognormal, 2-30 s."""
    seconds = np.random.default_rng(seed).lognormal(np.log(8), 0.7, 3 * count)
    speech = np.round(25 * seconds[(seconds > 2) & (seconds < 30)][:count])
    return (speech + np.round(speech / 6) + 2).astype(np.int32)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"cv2jax-{os.getuid()}"


def plan_of(lengths: np.ndarray, **options: Any) -> PackingPlan:
    defaults: dict[str, Any] = {"row_length": 512, "max_segments": 16, "batch_rows": 25, "seed": 3, "window": 300}
    return make_packing(lengths, **(defaults | options))


def epoch_rows(plan: PackingPlan, epoch: int) -> list[np.ndarray]:
    batches = [plan.batch(step) for step in range(epoch * plan.num_batches, (epoch + 1) * plan.num_batches)]
    assert {found for found, _ in batches} == {epoch}
    assert all(len(rows) == plan.batch_rows for _, rows in batches)
    return [row for _, rows in batches for row in rows]


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return [row.tolist() for row in left] == [row.tolist() for row in right]


@pytest.mark.parametrize("make", [embedded_lengths, emilia_lengths])
@pytest.mark.parametrize("count", [1500, 20_000])
def test_rows_are_full(make: Any, count: int) -> None:
    lengths = make(count)
    plan = make_packing(lengths, max_segments=64, batch_rows=16, seed=0)
    assert plan.row_length == 2048
    assert plan.fill >= 0.95
    assert plan.fill == lengths.sum() / (2048 * plan.num_rows)
    assert f"{count} utterances in {plan.num_rows} rows" in plan.table()
    assert f"{plan.fill:.1%} filled; left out: 0 empty, 0 too long" in plan.table()


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("options", [{}, {"max_segments": 2}, {"window": 7}, {"window": 5000, "row_length": 200}])
def test_an_epoch_shows_each_utterance_once_within_the_caps(seed: int, options: dict[str, Any]) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(-1, 230, int(random.integers(1, 1500)))
    plan = plan_of(lengths, seed=seed, **options)
    kept = np.flatnonzero((lengths > 0) & (lengths <= plan.row_length))
    assert plan.stats.num_utterances == len(kept)
    for epoch in (0, 5):
        rows = epoch_rows(plan, epoch)
        assert sorted(np.concatenate(rows[: plan.num_rows]).tolist()) == kept.tolist()
        assert same(rows[plan.num_rows :], (rows * plan.batch_rows)[: len(rows) - plan.num_rows])
        assert all(1 <= len(row) <= plan.max_segments and lengths[row].sum() <= plan.row_length for row in rows)


def test_rows_are_first_fit_inside_each_window_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(5).integers(1, 600, 1000)
    keys = []
    monkeypatch.setattr(
        "cv2jax.data.packing.permute", lambda indices, size, key: keys.append(key) or permute(indices, size, key)
    )
    plan = plan_of(lengths, max_segments=3, window=128)
    order = permute(np.arange(1000), 1000, keys[0])
    order = order[lengths[order] <= 512]
    expected = []
    for start in range(0, len(order), 128):
        window = order[start : start + 128]
        rows: list[list[int]] = []
        for index in window[np.argsort(-lengths[window], kind="stable")].tolist():
            fitting = [row for row in rows if len(row) < 3 and lengths[[*row, index]].sum() <= 512]
            (fitting[0] if fitting else rows.append([]) or rows[-1]).append(index)
        expected += rows
    shown = [row.tolist() for rows, mask in plan.evaluation_batches() for row in rows[: mask.sum()]]
    assert shown == expected


def test_a_plan_is_a_pure_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    lengths = embedded_lengths(2000)
    plan = plan_of(lengths)
    monkeypatch.setattr("cv2jax.data.packing._CHUNK", 911)  # chunks do not show
    again = plan_of(lengths.astype(np.int64), cache_dir=tmp_path / "other")
    assert again.hash == plan.hash
    for step in (1234, 0, 56):  # any step, in any order
        assert plan.batch(step)[0] == again.batch(step)[0] == step // plan.num_batches
        assert same(plan.batch(step)[1], again.batch(step)[1])
    changed = lengths.copy()
    changed[7] += 1
    others = [plan_of(lengths, seed=4), plan_of(changed), plan_of(lengths, max_segments=5), plan_of(lengths, window=99)]
    others += [plan_of(lengths, batch_rows=4), plan_of(lengths, row_length=513)]
    assert len({plan.hash, *(other.hash for other in others)}) == 7
    companies = [{frozenset(row.tolist()) for row in epoch_rows(p, 0)} for p in (plan, others[0])]
    assert len(companies[0] & companies[1]) < 5
    assert not same(epoch_rows(plan, 0), epoch_rows(plan, 1))
    assert {frozenset(row.tolist()) for row in epoch_rows(plan, 1)} == companies[0]


def test_batches_do_not_hang_on_the_slices_that_processes_take() -> None:
    plan = plan_of(embedded_lengths(700))
    for step in range(4):
        whole = plan.batch(step)[1]
        halves = [pickle.loads(pickle.dumps(plan)).batch(step)[1][part::2] for part in (0, 1)]
        assert same(whole[0::2] + whole[1::2], halves[0] + halves[1])


def test_evaluation_shows_each_utterance_once_and_fills_with_empty_rows() -> None:
    plan = plan_of(embedded_lengths(333))
    assert plan.num_rows % plan.batch_rows
    rows, masks = [], []
    for batch_rows, mask in plan.evaluation_batches():
        assert len(batch_rows) == len(mask) == plan.batch_rows
        rows += batch_rows
        masks += mask.tolist()
    assert sum(masks) == plan.num_rows
    assert masks == [len(row) > 0 for row in rows] == sorted(masks, reverse=True)
    assert sorted(np.concatenate(rows).tolist()) == list(range(333))
    with pytest.raises(IndexError, match="evaluation batch"):
        plan.evaluation_batch(plan.num_batches)
    with pytest.raises(ValueError, match="step -1"):
        plan.batch(-1)


def test_what_is_left_out_is_counted_by_its_first_reason() -> None:
    lengths = np.array([10, 513, 512, 0, 20, 30, 600], np.int32)
    text = np.array([1, 1, 1, 1, 0, 1, 0]) > 0
    plan = plan_of(lengths, keep={"without text": text, "without speech": lengths != 30})
    assert plan.stats.left_out == {"without text": 2, "without speech": 1, "empty": 1, "too long": 1}
    assert sorted(np.concatenate(epoch_rows(plan, 0)[: plan.num_rows]).tolist()) == [0, 2]
    assert "left out: 2 without text, 1 without speech, 1 empty, 1 too long" in plan.table()
    plain = plan_of(lengths, keep=text & (lengths != 30))
    assert plain.stats.left_out == {"not kept": 3, "empty": 1, "too long": 1}
    assert plain.hash == plan.hash
    with pytest.raises(UserError, match=r"^split dev: no utterance of 7 .* rows of 9 \(7 not kept, .*\); raise"):
        plan_of(lengths, row_length=9, keep=np.zeros(7, bool), name="dev")
    with pytest.raises(UserError, match="no utterance of 0"):
        plan_of(np.zeros(0, np.int32))
    with pytest.raises(Exception, match=r"keep|mask"):
        plan_of(lengths, keep=np.ones(6, bool))


@pytest.mark.parametrize("option", ["row_length", "max_segments", "batch_rows", "window"])
def test_impossible_options_are_user_errors(option: str) -> None:
    with pytest.raises(UserError, match="0: must be 1 or more"):
        plan_of(embedded_lengths(5), **{option: 0})


def test_equal_plans_share_one_file_and_pickle_as_its_path(cache: pathlib.Path) -> None:
    lengths = embedded_lengths(3000)
    plan = plan_of(lengths)
    (path,) = cache.glob("order-*")
    inode = path.stat().st_ino
    plan_of(lengths, batch_rows=3)  # of the same rows
    assert [found.stat().st_ino for found in cache.glob("order-*")] == [inode]
    data = pickle.dumps(plan)
    assert len(data) < 2000
    assert same(pickle.loads(data).batch(9)[1], plan.batch(9)[1])
    before = plan.batch(3)[1]
    del plan
    for damage in (b"", b"half", path.read_bytes()[:-4]):
        path.write_bytes(damage)
        assert same(plan_of(lengths).batch(3)[1], before)


def test_a_plan_that_cannot_be_written_is_a_user_error(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.with_name("file").write_text("")
    with pytest.raises(UserError, match=r"file/x: cannot write the packing plan .*name another$"):
        plan_of(embedded_lengths(5), cache_dir=cache.with_name("file") / "x")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(UserError, match=r"No space left on device; it takes up to 0.0 MiB.*TMPDIR"):
        plan_of(embedded_lengths(5))
    assert list(cache.glob("order-*")) == []


def test_memory_and_time_stay_small() -> None:
    lengths = emilia_lengths(1_200_000)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        plan = make_packing(lengths, max_segments=64, batch_rows=16, seed=0)
        plan.batch(3 * plan.num_batches + 1)
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 15
    assert peak < 200e6  # a chunk of a million utterances, whatever the corpus
