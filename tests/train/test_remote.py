"""A run whose workdir is in a bucket is the same run: record, resume, damage, lock, errors; against a stand-in of the cloud."""

import json
import os
import signal
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest

from cv2jax import remote
from cv2jax.config import UserError
from cv2jax.jobs.doctor import diagnose
from cv2jax.remote import as_path, fetched, is_held, is_remote
from cv2jax.tasks.trained import find_step
from cv2jax.train.checkpoint import complete_steps, load_subtree
from tests.bucket_server import environment, serving
from tests.multihost.pod import ROOT
from tests.run_record import Killed
from tests.train.test_loop import final_state, record, run, unbroken
from tests.train.toy import toy_config

__all__ = ["unbroken"]  # the fixture
BUCKET = "pod-runs"


@pytest.fixture(scope="module")
def server():
    with serving(BUCKET) as served, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(served.url).items():
            patch.setenv(name, value)
        yield served


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """They take longer than the run."""
    monkeypatch.setattr("cv2jax.train.recorder.draw_curves", lambda *arguments: None)


@pytest.fixture
def workdir(server):
    server.buckets[BUCKET].clear()
    fsspec.filesystem("gcs", finalize_on_close=True).invalidate_cache()
    return as_path(f"gs://{BUCKET}/runs/toy")


def assert_same(workdir, unbroken):
    local = fetched(workdir)
    assert record(local) == record(unbroken)
    assert (local / "audit.jsonl").read_bytes() == (unbroken / "audit.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(unbroken))


def dying_at(step):
    def die(index):
        if index == step:
            raise Killed

    return die


def test_a_killed_run_resumes_bit_for_bit(unbroken, workdir, server):
    with pytest.raises(Killed):
        run(workdir, on_step=dying_at(13))
    assert complete_steps(workdir / "checkpoints")[-1] == 12
    assert run(workdir) == 0
    assert_same(workdir, unbroken)
    names = {name.split("/")[2] for name in server.buckets[BUCKET]}
    assert names >= {"run.json", "end.json", "metrics.jsonl", "audit.jsonl", "tensorboard", "checkpoints"}
    assert "lock" not in names


def test_jobs_read_it_there(unbroken, workdir):
    assert run(workdir) == 0
    assert find_step(str(workdir)) == 20
    with pytest.raises(
        UserError, match=f"no checkpoint of step 7 in gs://{BUCKET}/runs/toy/checkpoints; choose one of 16, 20"
    ):
        find_step(str(workdir), 7)
    params = final_state(unbroken).params
    wanted = {"params": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)}
    jax.tree.map(np.testing.assert_array_equal, load_subtree(workdir / "checkpoints", wanted)["params"], params)
    there, _ = diagnose(str(workdir), against=str(unbroken))
    here, _ = diagnose(unbroken)
    assert (there.checkpoints, there.audit, there.end["code"]) == (here.checkpoints, here.audit, 0)
    assert not there.is_running
    with pytest.raises(UserError, match=f"gs://{BUCKET}/other holds no run"):
        diagnose(f"gs://{BUCKET}/other")


CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from cv2jax.jobs.doctor import diagnose
from cv2jax.remote import as_path
from tests.train.test_loop import run
run(as_path({workdir!r}), on_step=lambda step: step == 14 and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing_and_leaves_a_lock_that_does_not_hold(unbroken, workdir, server):
    code = CHILD.format(root=str(ROOT), workdir=str(workdir))
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "runs/toy/lock" in server.buckets[BUCKET]
    assert run(workdir) == 0
    assert_same(workdir, unbroken)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_damaged_newest_checkpoint_falls_back_and_is_kept_aside(unbroken, workdir, server, caplog):
    with pytest.raises(Killed):
        run(workdir, on_step=dying_at(13))
    objects = server.buckets[BUCKET]
    for name in [n for n in objects if n.startswith("runs/toy/checkpoints/12/state/") and "/d/" in n]:
        objects[name] = objects[name][: len(objects[name]) // 2]
    assert run(workdir) == 0
    assert "going on from step 8" in caplog.text
    assert any(name.startswith("runs/toy/checkpoints-damaged/12/") for name in objects)
    assert_same(workdir, unbroken)


def test_a_run_at_work_is_refused_and_a_stale_lock_is_taken(workdir, monkeypatch):
    monkeypatch.setattr(remote, "_STALE_SECONDS", 0.3)
    beats = iter(range(99))
    (workdir / "lock").write_text(json.dumps({"host": "elsewhere", "process": 7, "time": 0}))
    assert not is_held(workdir)
    with remote.locked(workdir):
        assert json.loads((workdir / "lock").read_text())["process"] == os.getpid()
        monkeypatch.setattr(remote, "_STALE_SECONDS", 90.0)
        assert is_held(workdir)
        monkeypatch.setattr(remote, "_holder", lambda path: {"host": "elsewhere", "process": 7, "time": next(beats)})
        with pytest.raises(
            UserError, match=r"another `cv2jax train` is at work there \(on host elsewhere, process 7\)"
        ):
            run(workdir)
    assert not (workdir / "lock").exists()


def test_another_config_is_refused_with_the_name_of_the_bucket(workdir):
    with pytest.raises(Killed):
        run(workdir, on_step=dying_at(9))
    with pytest.raises(UserError, match=f"gs://{BUCKET}/runs/toy holds a run of another config"):
        run(workdir, toy_config(seed=5))


@pytest.mark.parametrize(("place", "status"), [("gs://no-such-bucket/run", 0), (f"gs://{BUCKET}/run", 403)])
def test_a_bucket_that_cannot_be_used_is_one_line(server, place, status, monkeypatch):
    monkeypatch.setattr(server, "failing", status)
    with pytest.raises(
        UserError, match=f"{place}: the bucket cannot be used .*; see to its name, the credentials"
    ) as told:
        run(as_path(place))
    assert "\n" not in str(told.value)


def test_a_lost_connection_is_one_line(workdir, server, monkeypatch):
    with pytest.raises(UserError, match="the bucket cannot be used"):
        run(workdir, on_step=lambda step: step == 3 and monkeypatch.setattr(server, "failing", 403))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://a/b: needs the package gcsfs; pip install 'cv2jax\[gcs\]'"):
        as_path("gs://a/b")
    assert not is_remote(as_path("/a/b"))
