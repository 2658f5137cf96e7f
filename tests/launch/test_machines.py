"""The launchers of machines that tests have not, seen through false programs: Slurm and GKE."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from cv2jax.cli.main import verbs
from cv2jax.config import preset_names

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run([shutil.which("shellcheck") or "shellcheck", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_xpk_starts_again_what_may_be_started_again() -> None:
    page = (LAUNCH / "README.md").read_text(encoding="utf-8")
    codes = re.search(r"--restart-on-exit-codes (\S+)", page)
    assert codes
    assert set(codes[1].split(",")) == {"1", "69", "75"}


def test_slurm_needs_a_command() -> None:
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_slurm_shows_what_it_would_run() -> None:
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--dry-run", "cv2jax", "train", "a b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "srun --kill-on-bad-exit=0 --wait=600 cv2jax train a\\ b\n")


_SRUN = """#!/usr/bin/env bash
# Two processes; with --kill-on-bad-exit=1 the first that fails has the other killed, as Slurm does.
while [[ $1 == --* ]]; do [[ $1 != --kill-on-bad-exit=1 ]] || kills=1; shift; done
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
worst=0
for _ in 1 2; do
    wait -n; code=$?
    ((code <= worst)) || worst=$code
    [[ $code -eq 0 || -z ${kills:-} ]] || kill -KILL $first $second 2>/dev/null
done
exit $worst
"""


@pytest.mark.parametrize(("codes", "code"), [((75, 75), 75), ((75, 0), 75), ((0, 0), 0), ((2, 2), 2), ((75, 137), 137)])
def test_slurm_queues_a_preempted_job_again_and_no_other(
    tmp_path: pathlib.Path, codes: tuple[int, int], code: int
) -> None:
    (tmp_path / "srun").write_text(_SRUN, encoding="utf-8")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n', encoding="utf-8")
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    train = f"sleep 0.$((2 * SLURM_PROCID)); codes=({codes[0]} {codes[1]}); exit ${{codes[SLURM_PROCID]}}"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "VENV": "/none"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "bash", "-c", train]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    requeued = tmp_path / "requeued"
    assert (requeued.read_text(encoding="utf-8") if requeued.exists() else "") == ("requeue 17\n" if code == 75 else "")


def test_gke_runs_a_shipped_preset_and_gives_up_on_user_errors_only() -> None:
    job_set = yaml.safe_load((LAUNCH / "gke.yaml").read_text(encoding="utf-8"))
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    program, verb, preset, *_ = pod["containers"][0]["command"]
    assert (program, verb in verbs(), preset in preset_names()) == ("cv2jax", True, True)
    assert {"name": "CV2JAX_DISTRIBUTED", "value": "1"} in pod["containers"][0]["env"]
    memory = [volume["name"] for volume in pod["volumes"] if volume.get("emptyDir") == {"medium": "Memory"}]
    mounts = pod["containers"][0]["volumeMounts"]
    assert [mount["name"] for mount in mounts if mount["mountPath"] == "/dev/shm"] == memory != []
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never"  # the pod failure policy needs it
