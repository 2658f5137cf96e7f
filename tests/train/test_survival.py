"""A run that is killed goes on bit for bit: in a step, a save, an evaluation, at start-up, with a damaged checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.train.audit import FILE, first_difference, read_audit
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.loop import EXIT_PREEMPTED
from tests.multihost.pod import ROOT
from tests.run_record import Killed
from tests.train.test_checkpoint import damage
from tests.train.test_loop import final_state, record, run, unbroken
from tests.train.toy import toy_config

__all__ = ["unbroken"]  # the fixture
pytestmark = pytest.mark.usefixtures("_no_curves")


@pytest.fixture
def _no_curves(monkeypatch):
    """They take longer than the run."""
    monkeypatch.setattr("cv2jax.train.recorder.draw_curves", lambda *arguments: None)


def assert_same(workdir, unbroken):
    assert record(workdir) == record(unbroken)
    assert first_difference(workdir, unbroken) is None
    assert (workdir / FILE).read_bytes() == (unbroken / FILE).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(unbroken))


def dying_at(step):
    def die(index):
        if index == step:
            raise Killed

    return die


def test_the_audit_has_every_step(unbroken):
    audit = read_audit(unbroken / FILE)
    assert list(audit) == list(range(1, 21))
    assert {row["epoch"] for row in audit.values()} == {0, 1}
    lines = {x["step"]: x["batch_hash"] for x in record(unbroken) if x["kind"] == "train"}
    assert {step: audit[step]["batch_hash"] for step in lines} == lines


@pytest.mark.parametrize("kills", [(2,), (7, 13), (16, 17)])
def test_the_audit_of_a_killed_run_is_that_of_the_unbroken_one(unbroken, tmp_path, kills):
    for at in kills:
        with pytest.raises(Killed):
            run(tmp_path, on_step=dying_at(at))
    assert run(tmp_path) == 0
    assert_same(tmp_path, unbroken)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(unbroken, tmp_path, how, caplog):
    with pytest.raises(Killed):
        run(tmp_path, on_step=dying_at(11))
    damage(tmp_path / "checkpoints" / "8" / "state" / "manifest.ocdbt", how)
    assert run(tmp_path) == 0
    assert [r.getMessage() for r in caplog.records if "going on from step 4" in r.getMessage()]
    assert_same(tmp_path, unbroken)


def test_a_kill_in_a_save_leaves_the_one_before(unbroken, tmp_path, monkeypatch):
    save = Checkpoints.save

    def die(self, step, state):
        save(self, step, state)
        self.wait()
        if step == 12:  # as if it had died before the last rename
            place = tmp_path / "checkpoints" / "12"
            place.rename(place.with_name("12.orbax-checkpoint-tmp"))
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", die)
        with pytest.raises(Killed):
            run(tmp_path)
    assert run(tmp_path) == 0
    assert_same(tmp_path, unbroken)
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if "tmp" in name]


@pytest.mark.parametrize("place", ["cv2jax.train.loop.compile_steps", "cv2jax.train.recorder.draw_curves"])
def test_a_kill_at_start_up_or_in_an_evaluation(unbroken, tmp_path, monkeypatch, place):
    with pytest.raises(Killed):
        run(tmp_path, on_step=dying_at(6))

    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(place, die)
        with pytest.raises(Killed):
            run(tmp_path)
    assert run(tmp_path) == 0
    assert_same(tmp_path, unbroken)


def test_a_stop_while_a_save_is_written_is_saved_too(unbroken, tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: saved.append(step) or save(self, step, state))

    def terminate(step):
        if step == 8:  # right behind the save of step 8
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(tmp_path, on_step=terminate) == EXIT_PREEMPTED
    assert saved == [4, 8, 9]
    assert run(tmp_path) == 0
    assert_same(tmp_path, unbroken)


def test_the_end_of_a_run_is_noted_and_a_kill_leaves_no_note(tmp_path):
    def end():
        return json.loads((tmp_path / "end.json").read_text())

    def terminate(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = toy_config(num_steps=6)
    assert run(tmp_path, config, on_step=terminate) == EXIT_PREEMPTED
    assert (end()["step"], end()["code"], end()["reason"]) == (3, EXIT_PREEMPTED, "asked to stop")

    def fail(step):
        raise UserError("one line")

    with pytest.raises(UserError):
        run(tmp_path, config, on_step=fail)
    assert (end()["step"], end()["code"], end()["reason"]) == (3, 2, "UserError: one line")
    seen = []
    assert run(tmp_path, config, on_step=lambda step: seen.append((tmp_path / "end.json").exists())) == 0
    assert seen == [False] * 3
    assert (end()["step"], end()["code"], end()["reason"]) == (6, 0, "finished")


COMMAND = """
import pathlib, sys, time
from cv2jax.train.loop import train
from cv2jax.train.stop import StopSignal
from tests.train.toy import toy_config

with StopSignal() as stop:
    print("started", flush=True)
    config = toy_config(num_steps=120, save_every=3)
    task = ToyTask(config, on_step=lambda step: time.sleep(0.02))
    sys.exit(train(task, config, pathlib.Path(sys.argv[1]), stop))
"""


def start(workdir):
    command = [sys.executable, "-c", COMMAND, workdir]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_random_kills_of_a_process_change_nothing(tmp_path):
    """Small version of tests/multihost/test_kills.py."""
    whole, killed, choose = tmp_path / "whole", tmp_path / "killed", random.Random(7)
    process = start(whole)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    for kill, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = start(killed)
        assert process.stdout.readline() == "started\n"
        if kill < 2:
            at = 30 + 40 * kill + choose.randrange(10)
            while max(read_audit(killed / FILE), default=0) < at:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
        else:
            time.sleep(choose.random())  # at start-up
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode == (EXIT_PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL), error
    process = start(killed)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert (killed / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert record(killed) == record(whole)
    config = toy_config(num_steps=120)
    jax.tree.map(np.testing.assert_array_equal, final_state(killed, config), final_state(whole, config))


def test_what_is_damaged_beyond_the_record_is_taken_back(tmp_path):
    """Lines after the restored step are written anew, also those of the audit that the lost checkpoint had covered."""
    config = toy_config(num_steps=10)
    assert run(tmp_path / "a", config) == 0
    with pytest.raises(Killed):
        run(tmp_path / "b", config, on_step=dying_at(9))
    assert max(read_audit(tmp_path / "b" / FILE)) == 9
    damage(tmp_path / "b" / "checkpoints" / "8" / "state" / "_METADATA", "missing")
    seen = []
    assert run(tmp_path / "b", config, on_step=seen.append) == 0
    assert seen[0] == 4
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
