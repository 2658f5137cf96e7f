"""Twenty random kills of a rehearsed run of two processes: each restart goes on, and the end is that of an unkilled run."""

import os
import random
import re
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
from tests.multihost.pod import finish, start
from tests.run_record import record
from tests.small_corpus import SMALL_RUN, make_small_corpus

pytestmark = [pytest.mark.full, pytest.mark.multihost]
KILLS, STEPS = 20, 420
SETS = [*SMALL_RUN, f"num_steps={STEPS}", "log_every=7", "evaluate_every=60", "save_every=5", "mesh.fsdp=2"]


def command(corpus, workdir):
    return [
        "train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={workdir}", *[f"--set={s}" for s in SETS]
    ]  # fmt: skip


def reached(workdir):
    return max(read_audit(workdir / FILE), default=0)


def wait_for(processes, condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), finish(processes)
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.005)


def final_params(corpus, workdir):
    config = override(load_config("speech_tokenizer_tiny"), [f"data.corpus={corpus}", *SETS])
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return checkpoints.load(abstract_state(make_task(config).init_state, mesh)[0], STEPS)


def moment(where, processes, workdir, target, choose):
    """Waits for the moment to kill at: behind a step, while a save is being written, or somewhere at start-up."""
    if where == "start":
        time.sleep(choose.uniform(0.2, 9.0))
        return
    wait_for(processes, lambda: reached(workdir) >= target)
    if where == "save":
        folder = workdir / "checkpoints"
        wait_for(processes, lambda: any(re.search(r"tmp", name) for name in os.listdir(folder)))


def test_twenty_random_kills_change_nothing(tmp_path):
    corpus, whole, killed = make_small_corpus(tmp_path / "c"), tmp_path / "whole", tmp_path / "killed"
    results = finish(start(command(corpus, whole), 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    choose, seen = random.Random(20), []
    for kill in range(KILLS):
        where = ("step", "save", "start")[kill % 3]
        number = choose.choice([signal.SIGKILL, signal.SIGTERM])
        before, processes = reached(killed), start(command(corpus, killed), 2, 1)
        try:
            moment(where, processes, killed, before + choose.randrange(8, 25), choose)
            victim = choose.choice(processes)
            victim.send_signal(number)
            try:
                victim.wait(120)
                for other in processes:  # ended by JAX once it misses the first, or at the same step by a SIGTERM
                    other.wait(120)
            finally:
                codes = [p.poll() for p in processes]
                for p in processes:
                    p.kill()
        finally:
            finish(processes)
        seen.append((where, number.name, before, reached(killed), codes))
        print(*seen[-1], flush=True)
        assert reached(killed) < STEPS, "the run must not end before its last kill"
        if where != "start":
            assert reached(killed) > before, seen
    results = finish(start(command(corpus, killed), 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    assert (killed / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert record(killed) == record(whole)
    jax.tree.map(np.testing.assert_array_equal, final_params(corpus, killed), final_params(corpus, whole))
