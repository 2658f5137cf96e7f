"""Random kills of a rehearsed run of two processes: each restart goes on, and the end is that of an unkilled run."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from cv2jax.config import MeshConfig, load_config, override
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.audit import FILE, read_audit
from cv2jax.train.checkpoint import Checkpoints
from tests.multihost import pod, toy_pod
from tests.multihost.pod import finish
from tests.run_record import record
from tests.small_corpus import SMALL_RUN, make_small_corpus
from tests.train.toy import ToyTask, toy_config

pytestmark = pytest.mark.multihost
STEPS = 420
PACE = {"num_steps": STEPS, "log_every": 7, "evaluate_every": 60, "save_every": 5}


class Toy:
    """The toy task, whose processes start in seconds."""

    def __init__(self, place):
        self.config = toy_config(**PACE, mesh=MeshConfig(fsdp=2))

    def start(self, workdir):
        return toy_pod.start(workdir, **PACE)

    def task(self):
        return ToyTask(self.config)


class Stage:
    """The speech tokenizer, by the command line."""

    def __init__(self, place):
        self.corpus = make_small_corpus(place / "corpus")
        self.sets = [*SMALL_RUN, *(f"{key}={value}" for key, value in PACE.items()), "mesh.fsdp=2"]

    def start(self, workdir):
        sets = [f"--set={s}" for s in self.sets]
        words = ["train", "speech_tokenizer_tiny", f"--corpus={self.corpus}", f"--workdir={workdir}", *sets]
        return pod.start(words, 2, 1)

    def task(self):
        return make_task(override(load_config("speech_tokenizer_tiny"), [f"data.corpus={self.corpus}", *self.sets]))


def final_state(run, workdir):
    abstract, _ = abstract_state(run.task().init_state, make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return checkpoints.load(abstract, STEPS)


def reached(workdir):
    return max(read_audit(workdir / FILE), default=0)


def wait_for(processes, condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), finish(processes)
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.005)


def await_moment(where, processes, workdir, target, choose):
    """Waits for the moment to kill at: behind a step, while a save is being written, or somewhere at start-up."""
    if where == "start":
        time.sleep(choose.uniform(0.2, 9.0))
        return
    wait_for(processes, lambda: reached(workdir) >= target)
    if where == "save":
        wait_for(processes, lambda: any("tmp" in name for name in os.listdir(workdir / "checkpoints")))


def kill_once(run, workdir, where, number, choose):
    """Starts the run, kills one process of it, and returns the exit codes of both, None where one had to be ended too."""
    processes = run.start(workdir)
    try:
        await_moment(where, processes, workdir, reached(workdir) + choose.randrange(6, 16), choose)
        choose.choice(processes).send_signal(number)
        deadline = time.monotonic() + 150  # JAX ends the other once it misses the first; both stop by a SIGTERM
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.1)
        return [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
        finish(processes)


@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        pytest.param(Toy, 3, marks=pytest.mark.slow),
        pytest.param(Toy, 20, marks=pytest.mark.full),
        pytest.param(Stage, 20, marks=pytest.mark.full),
    ],
)
def test_random_kills_change_nothing(tmp_path, stage, kills):
    run, whole, killed, choose = stage(tmp_path), tmp_path / "whole", tmp_path / "killed", random.Random(20)
    results = finish(run.start(whole))
    assert [code for code, _ in results] == [0, 0], results
    for kill in range(kills):
        where, number = ("step", "save", "start")[kill % 3], choose.choice([signal.SIGKILL, signal.SIGTERM])
        before = reached(killed)
        codes = kill_once(run, killed, where, number, choose)
        print(kill, where, number.name, before, "→", reached(killed), codes, flush=True)
        assert before <= reached(killed) < STEPS or where == "start"
        if where != "start":
            assert reached(killed) > before
    results = finish(run.start(killed))
    assert [code for code, _ in results] == [0, 0], results
    assert (killed / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert record(killed) == record(whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(run, killed), final_state(run, whole))
