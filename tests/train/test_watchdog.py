"""The watchdog: a stuck phase is named, stacks are left, the exit code is its own; what may take long is let be."""

import json
import subprocess
import sys
import threading

import pytest

from cv2jax.train.clock import Clock, Phase
from cv2jax.train.watchdog import EXIT_STUCK, Watchdog
from tests.multihost.pod import ROOT

STUCK = """
import sys, threading, pathlib
from cv2jax.train.loop import train
from cv2jax.train.watchdog import Watchdog
from tests.train.toy import ToyTask, toy_config

def hang(step):
    if step == 4:
        def waits_for_nothing():
            threading.Event().wait()
        waits_for_nothing()

# Not what other phases take on a busy machine.
Watchdog.allowed = lambda self, phase: 2.0 if phase.step == 5 and phase.name == "data" else 1e9
config = toy_config(num_steps=6, stuck_seconds=1.0)
sys.exit(train(ToyTask(config, on_step=hang), config, pathlib.Path(sys.argv[1])))
"""


def test_a_run_that_hangs_ends_with_its_stacks_and_goes_on_when_started_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == EXIT_STUCK
    assert "process 0: stuck: the data wait of step 5 has taken" in done.stderr
    stacks = (tmp_path / "stuck-5-process-0.txt").read_text()
    assert "data wait of step 5" in stacks
    assert "waits_for_nothing" in stacks
    end = json.loads((tmp_path / "end.json").read_text())
    assert (end["code"], end["reason"]) == (EXIT_STUCK, "stuck in the data wait of step 5")
    assert (tmp_path / "checkpoints" / "4").is_dir()


@pytest.fixture
def dog(tmp_path):
    now = [0.0]
    return Watchdog(Clock(lambda: now[0]), tmp_path, 100.0), now


def test_what_may_take_long_is_let_be(dog):
    watchdog, now = dog
    clock = watchdog._clock
    assert watchdog.allowed(Phase("start", 1, 0.0)) == watchdog.allowed(Phase("evaluate", 1, 0.0)) == 400.0
    assert {watchdog.allowed(Phase(name, 1, 0.0)) for name in ("data", "step", "save")} == {100.0}

    def slow():
        for _ in range(5):
            now[0] += 8.0
            yield 0

    list(clock.waits(slow(), 1, lambda: True))
    assert watchdog.allowed(Phase("step", 1, 0.0)) == 160.0  # 20 medians
    clock.enter("evaluate", 5)
    now[0] += 300.0
    clock.enter("data", 6)
    assert watchdog.allowed(Phase("evaluate", 10, 0.0)) == 1500.0


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_run_that_is_well_is_left_alone(tmp_path, seconds):
    ended = []
    before = threading.active_count()
    with Watchdog(Clock(), tmp_path, seconds, end=ended.append):
        assert threading.active_count() - before == bool(seconds)
    assert threading.active_count() == before
    assert not ended
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_does_not_keep_a_stuck_run_alive(tmp_path):
    ended = threading.Event()
    with Watchdog(Clock(), tmp_path / "gone", 0.01, end=lambda code: ended.set()):
        assert ended.wait(30)
