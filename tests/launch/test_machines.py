"""The launchers of machines that tests have not: their syntax, and what they would run, seen through false programs."""

import os
import pathlib
import shlex
import stat
import subprocess

import pytest
import yaml

from cv2jax.cli.main import verbs
from cv2jax.config import preset_names

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def gcloud(tmp_path: pathlib.Path) -> dict[str, str]:
    """An environment whose `gcloud` writes its arguments to $CALLS, one a line, calls parted by an empty line."""
    program = tmp_path / "gcloud"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "" >> "$CALLS"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


def _tpu_vm(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_scripts_are_valid_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tpu_vm_runs_the_command_on_all_workers(gcloud: dict[str, str]) -> None:
    words = ["cv2jax", "train", "speech_tokenizer_base", "--set", "data.corpus=/a b"]
    done = _tpu_vm({**gcloud, "PROJECT": "speech"}, "run", "pod", "europe-west4-b", *words)
    assert done.returncode == 0, done.stderr
    call = pathlib.Path(gcloud["CALLS"]).read_text(encoding="utf-8").splitlines()
    assert call[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--worker=all", "europe-west4-b", "speech"} <= set(call)
    prepared, ran = call[call.index("--command") + 1].split(";")
    assert "CV2JAX_DISTRIBUTED=1" in prepared
    assert shlex.split(ran) == words


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "pod", "zone"], ["walk", "pod", "zone"]])
def test_tpu_vm_refuses_what_it_does_not_understand(gcloud: dict[str, str], arguments: list[str]) -> None:
    done = _tpu_vm(gcloud, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not pathlib.Path(gcloud["CALLS"]).exists()


def test_slurm_needs_a_command() -> None:
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


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
