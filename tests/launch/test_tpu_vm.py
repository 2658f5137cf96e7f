"""A TPU VM's life, played by a false `gcloud` that notes its arguments and runs on this machine what a worker would run."""

import os
import pathlib
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu_vm.sh"
# The state of the queued resource is a file, a worker a home directory. BROKEN names a verb that fails; the file `preempted`
# holds the state after the moment at which somebody follows the log.
GCLOUD = r"""#!/usr/bin/env bash
cd "$PLAY"
{ printf '%q ' gcloud "$@" | sed 's/ $//'; echo; } >> calls
if [[ ${BROKEN:-} == "$4" ]]; then echo "ERROR: quota" >&2; exit 1; fi
case "$3 $4" in
"queued-resources describe") cat state 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
"queued-resources create") echo ACTIVE > state ;;
"queued-resources delete") rm -rf state "$5"* ;;
"tpu-vm ssh")
    for last; do :; done
    if [[ -s preempted && $last == *"tail -n"* ]]; then mv preempted state; fi
    [[ ! -e state || $(<state) == ACTIVE ]] || exit 255
    export HOME="$PLAY/$5"
    mkdir -p "$HOME"
    if [[ $last != *"pip install"* ]]; then bash -c "$last"; fi ;;
esac
"""
WHERE = ["pod", "europe-west4-b"]


@pytest.fixture
def play(tmp_path: pathlib.Path) -> pathlib.Path:
    """The stage: a directory with false programs in `bin`."""
    programs = {
        "gcloud": GCLOUD,
        "python": '#!/bin/sh\n{ printf "%s " "$0" "$@" | sed "s/ $//"; echo; } >> "$PLAY/calls"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def _environment(play: pathlib.Path, **more: str) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("CV2JAX_")}
    false = {"PATH": f"{play / 'bin'}:{os.environ['PATH']}", "PYTHON": str(play / "bin" / "python"), "PLAY": str(play)}
    return {**ours, **false, "POLL_SECONDS": "0.1", **more}


def _run(play: pathlib.Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=_environment(play, **more), capture_output=True, text=True, timeout=60)


def _calls(play: pathlib.Path) -> list[str]:
    path = play / "calls"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _state(play: pathlib.Path, state: str = "ACTIVE") -> None:
    (play / "state").write_text(f"{state}\n", encoding="utf-8")


@pytest.mark.parametrize("slices", ["1", "2"])
@pytest.mark.parametrize(
    ("before", "verb", "rest"),
    [
        ("", "create", ["v5litepod-16", "--spot"]),
        ("ACTIVE", "install", []),
        ("ACTIVE", "run", ["echo", "a b"]),
        ("ACTIVE", "status", []),
        ("ACTIVE", "delete", []),
        ("", "train", ["v6e-256", "--reserved", "--", "true"]),
    ],
)
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(
    play: pathlib.Path, slices: str, before: str, verb: str, rest: list[str]
) -> None:
    settings = {"SLICES": slices, "PROJECT": "speech", "CV2JAX_JOIN_SECONDS": "600"}
    dry = _run(play, "--dry-run", verb, *WHERE, *rest, **settings)
    assert dry.returncode == 0, dry.stderr
    assert not _calls(play)
    if before:
        _state(play, before)
    wet = _run(play, verb, *WHERE, *rest, **settings)
    assert wet.returncode == 0, wet.stderr
    printed = [line for line in dry.stdout.splitlines() if line != "ACTIVE"]  # the answer of `status`
    assert printed == _calls(play)
    assert all("--project speech" in line for line in printed if line.startswith("gcloud"))


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_a_slice_is_asked_for_with_its_runtime(play: pathlib.Path, kind: str, runtime: str) -> None:
    assert _run(play, "create", *WHERE, kind).returncode == 0
    assert f"--accelerator-type {kind} --runtime-version {runtime} --node-id pod" in _calls(play)[1]
    assert _run(play, "create", *WHERE, kind).returncode == 0  # it is there: nothing more is asked for
    assert sum(" create " in call for call in _calls(play)) == 1


@pytest.mark.parametrize("code", [0, 1, 2, 69, 75])
def test_the_exit_code_of_the_command_reaches_the_user(play: pathlib.Path, code: int) -> None:
    done = _run(
        play, "run", *WHERE, "bash", "-c", f'echo "said $CV2JAX_DISTRIBUTED $CV2JAX_X"; exit {code}', CV2JAX_X="a b"
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "said 1 a b\n"
    assert (play / "pod" / "cv2jax-run" / "exit").read_text() == f"{code}\n"
    assert f"exit codes of the workers: {code}" in done.stderr
    assert _run(play, "tail", *WHERE).returncode == code


def test_the_worst_code_of_all_slices_counts(play: pathlib.Path) -> None:
    command = ["bash", "-c", "case $HOME in *-0) exit 69 ;; *-1) exit 137 ;; *) exit 75 ;; esac"]
    done = _run(play, "run", *WHERE, *command, SLICES="3")
    assert done.returncode == 137
    assert "exit codes of the workers: 69 137 75" in done.stderr


def test_the_command_outlives_the_session_and_a_second_is_refused(play: pathlib.Path) -> None:
    command = ["bash", "-c", "trap 'echo saved; exit 75' TERM; echo ready; for i in {1..300}; do sleep 0.1; done"]
    assert _run(play, "start", *WHERE, *command).returncode == 0
    log = play / "pod" / "cv2jax-run" / "log"
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.05)
    second = _run(play, "run", *WHERE, "true")
    assert second.returncode == 2
    assert "a command is at work here: stop it, or tail it" in second.stderr
    assert _run(play, "stop", *WHERE).returncode == 0
    done = _run(play, "tail", *WHERE)
    assert (done.returncode, done.stdout) == (75, "ready\nsaved\n")


def test_a_preempted_slice_is_made_again_and_the_command_goes_on(play: pathlib.Path) -> None:
    (play / "preempted").write_text("SUSPENDED\n")
    done = _run(play, "train", *WHERE, "v5litepod-16", "--spot", "--", "true")
    assert done.returncode == 0, done.stderr
    verbs = [call.split()[4] for call in _calls(play) if "queued-resources" in call]
    assert [verb for verb in verbs if verb != "describe"] == ["create", "delete", "create", "delete"]
    assert "started again (1 of at most 20); pod is SUSPENDED" in done.stderr
    assert not (play / "state").exists()


def test_starting_again_has_an_end(play: pathlib.Path) -> None:
    done = _run(play, "train", *WHERE, "v5litepod-16", "--", "bash", "-c", "exit 75", RESTARTS="2")
    assert done.returncode == 75
    assert "ended with 75 after 2 restarts (RESTARTS); pod is kept" in done.stderr
    assert sum("nohup" in call for call in _calls(play)) == 3
    assert (play / "state").exists()


def test_a_users_mistake_is_not_started_again(play: pathlib.Path) -> None:
    done = _run(play, "train", *WHERE, "v5litepod-16", "--", "bash", "-c", "exit 2")
    assert done.returncode == 2
    assert sum("nohup" in call for call in _calls(play)) == 1
    assert not (play / "state").exists()


@pytest.mark.parametrize(
    ("broken", "words", "told"),
    [
        ("create", ["create", *WHERE, "v5litepod-16"], "pod could not be asked for"),
        ("scp", ["install", *WHERE], "the package could not be copied to pod"),
        ("ssh", ["install", *WHERE], "the package could not be installed on every worker of pod"),
        ("ssh", ["run", *WHERE, "true"], "the command could not be started on every worker of pod"),
        ("describe", ["status", *WHERE], "the state of pod cannot be asked: ERROR: quota"),
        ("delete", ["delete", *WHERE], "pod could not be deleted"),
    ],
)
def test_what_gcloud_cannot_do_is_named(play: pathlib.Path, broken: str, words: list[str], told: str) -> None:
    done = _run(play, *words, BROKEN=broken)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"tpu_vm.sh: {told}")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_resource_that_will_not_come_is_named(play: pathlib.Path, state: str) -> None:
    _state(play, state)
    done = _run(play, "create", *WHERE, "v5litepod-16")
    assert done.returncode == 1
    assert done.stderr == f"tpu_vm.sh: pod is {state} and will not come; `delete` it and create it again\n"


def test_a_resource_that_does_not_come_in_time_is_named(play: pathlib.Path) -> None:
    _state(play, "WAITING_FOR_RESOURCES")
    done = _run(play, "create", *WHERE, "v5litepod-16", WAIT_MINUTES="0")
    assert done.returncode == 1
    assert "pod is still WAITING_FOR_RESOURCES after 0 minutes" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "expected a verb, NAME and ZONE"),
        (["run", "pod"], "expected a verb, NAME and ZONE"),
        (["walk", *WHERE], "there is no verb 'walk'"),
        (["run", *WHERE], "a COMMAND is missing"),
        (["create", *WHERE], "create needs a TYPE"),
        (["create", *WHERE, "v5litepod-16", "--cheap"], "only --spot or --reserved, not '--cheap'"),
        (["create", *WHERE, "v9-1"], "the runtime of v9-1 is not known here; give it as RUNTIME"),
        (["train", *WHERE, "v5litepod-16"], "train needs -- and a COMMAND behind TYPE"),
        (["delete", *WHERE, "now"], "delete takes nothing behind ZONE, not 'now'"),
        (["tail", *WHERE], "there is no command to follow on pod"),
    ],
)
def test_mistakes_are_one_line(play: pathlib.Path, words: list[str], told: str) -> None:
    done = _run(play, *words)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("tpu_vm.sh: ")]
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize("name", ["SLICES", "RESTARTS", "WAIT_MINUTES"])
def test_settings_that_are_no_numbers_are_one_line(play: pathlib.Path, name: str) -> None:
    done = _run(play, "status", *WHERE, **{name: "many"})
    assert done.returncode == 2
    assert done.stderr == "tpu_vm.sh: SLICES, RESTARTS and WAIT_MINUTES must be whole numbers, not 'many'\n"
