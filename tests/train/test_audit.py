"""The audit: a line a step, taken back on resume, forgiving of what a kill or a dying disk left, and comparable."""

import numpy as np
import pytest

from cv2jax.data.content import BatchContent
from cv2jax.train.audit import COLUMNS, FILE, AuditLog, first_difference, read_audit


def content(step):
    return BatchContent(epoch=step // 4, bucket=step % 2, num_utterances=8, used=3.0, slots=4.0, unit="tokens")


def write(workdir, start, steps, *, poisoned=(), changed=()):
    workdir.mkdir(exist_ok=True)
    log = AuditLog(workdir, start)
    for step in steps:
        finite = np.arange(8) != 3 if step in poisoned else np.ones(8, bool)
        metrics = {"skipped": np.array(step in poisoned), "row_finite": finite}
        log.write(step, content(step), metrics | {"batch_hash": np.uint32(4_000_000_000 + step + (step in changed))})
    log.flush(sync=True)
    log.close()
    return workdir


def test_every_step_has_a_line(tmp_path):
    write(tmp_path, 0, range(1, 7), poisoned={4})
    audit = read_audit(tmp_path / FILE)
    assert list(audit) == [1, 2, 3, 4, 5, 6]
    assert audit[4] == dict(zip(COLUMNS, (4, 1, 0, 4_000_000_004, 8, 1), strict=True))
    assert audit[5]["skipped_rows"] == 0


def test_a_gradient_that_is_not_finite_skips_all_rows(tmp_path):
    log = AuditLog(tmp_path, 0)
    log.write(1, content(1), {"skipped": np.array(True), "row_finite": np.ones(8, bool), "batch_hash": np.uint32(1)})
    log.close()
    assert read_audit(tmp_path / FILE)[1]["skipped_rows"] == 8


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_resume_takes_back_what_lies_behind_its_step(tmp_path, start):
    whole = write(tmp_path / "whole", 0, range(1, 9))
    write(tmp_path / "resumed", 0, range(1, 7))
    write(tmp_path / "resumed", start, range(start + 1, 9))
    assert (tmp_path / "resumed" / FILE).read_bytes() == (whole / FILE).read_bytes()


@pytest.mark.parametrize("rest", [b"[7,1", b"\0\0\0\n\0", b"[1,2]\n", b'{"a": 1}\n', b"[7,1,1,1,8,true1]\n"])
def test_what_a_kill_left_at_the_end_is_taken_away(tmp_path, rest):
    write(tmp_path, 0, range(1, 7))
    good = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(good + rest)
    assert list(read_audit(tmp_path / FILE)) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, 6, [7])
    assert list(read_audit(tmp_path / FILE)) == [1, 2, 3, 4, 5, 6, 7]


def test_lines_that_are_lost_are_told_and_the_run_goes_on(tmp_path, caplog):
    write(tmp_path, 0, range(1, 7))
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join([*lines[:3], b"garbage\n", *lines[4:]]))
    write(tmp_path, 6, [7, 8])
    assert "lines after step 2 were damaged" in caplog.text
    assert list(read_audit(tmp_path / FILE)) == [1, 2, 7, 8]


def test_a_file_without_its_first_line_starts_anew(tmp_path):
    (tmp_path / FILE).write_bytes(b"no header\n")
    assert read_audit(tmp_path / FILE) == {}
    write(tmp_path, 3, [4])
    assert list(read_audit(tmp_path / FILE)) == [4]


def test_the_first_difference_of_two_runs(tmp_path):
    ours = write(tmp_path / "a", 0, range(1, 9))
    assert first_difference(ours, write(tmp_path / "shorter", 0, range(1, 5))) is None
    assert first_difference(ours, write(tmp_path / "b", 0, range(1, 9), changed={5, 7})) == (
        "step 5: batch_hash 4000000005 → 4000000006"
    )
    gap = write(tmp_path / "c", 0, [1, 2, 4, 5])
    assert first_difference(ours, gap) == f"step 3 is only in {ours / FILE}"
    assert first_difference(ours, tmp_path / "nothing") is None
