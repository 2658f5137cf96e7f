"""The rehearsal of a pod, with commands that take no time: places, prefixes, exit codes, signals, bad input."""

import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "rehearse.py"
GRACE_SECONDS = "1"
HOST = socket.gethostname()


def _command(code: str, *options: str) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--grace_seconds", GRACE_SECONDS, *options]
    return [*command, "--", sys.executable, "-c", f"import os, signal, sys, time\nargv = sys.argv[1:]\n{code}"]


def _rehearse(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(code, *options), capture_output=True, text=True, timeout=60)


def test_each_process_gets_its_place_and_its_devices() -> None:
    done = _rehearse("print(*argv, os.environ['JAX_NUM_CPU_DEVICES'])", "--processes", "3", "--devices", "2")
    assert done.returncode == 0, done.stderr
    places = sorted(
        re.findall(r"^\[(\d)\] --coordinator=(\S+) --num_processes=3 --process_id=(\d) 2$", done.stdout, re.M)
    )
    assert [(prefix, index) for prefix, _, index in places] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({address for _, address, _ in places}) == 1


def test_flags_of_xla_stay_but_for_a_number_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=9 --xla_b=2")
    done = _rehearse("print(os.environ['XLA_FLAGS'])", "--processes", "1")
    assert done.stdout == "[0] --xla_a=1 --xla_b=2\n"


def test_a_dry_run_prints_the_commands_and_starts_none(tmp_path: pathlib.Path) -> None:
    options = ["--dry-run", "--processes", "2", "--devices", "3", "--", "touch", f"{tmp_path}/a b"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    port = re.search(r"127\.0\.0\.1:\d+", done.stdout)
    assert port
    place = f"--coordinator={port[0]} --num_processes=2 --process_id="
    start = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3 PYTHONUNBUFFERED=1 touch"
    assert done.stdout.splitlines() == [f"{start} '{tmp_path}/a b' {place}{i}" for i in range(2)]
    assert not list(tmp_path.iterdir())


def test_a_failure_stops_the_others_and_its_code_counts() -> None:
    done = _rehearse("sys.exit(3) if argv[-1] == '--process_id=1' else time.sleep(100)")
    assert done.returncode == 3
    assert f"process 1 (host {HOST}) failed with 3: stopping the others" in done.stdout


def test_who_failed_first_is_named_and_not_who_ended_because_of_it() -> None:
    code = "if argv[-1] == '--process_id=0': sys.exit(69)\ntime.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    done = _rehearse(code)
    assert done.returncode == 128 + signal.SIGKILL
    assert f"process 1 (host {HOST}) died of SIGKILL" in done.stdout


def test_what_a_dead_process_started_is_ended_too(tmp_path: pathlib.Path) -> None:
    note = tmp_path / "child"
    code = (
        "import subprocess\n"
        f"if argv[-1] == '--process_id=0': open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '100']).pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = _rehearse(code)
    assert done.returncode == 128 + signal.SIGKILL
    child = pathlib.Path("/proc") / note.read_text() / "stat"
    assert (
        not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
    )  # perhaps nobody has reaped it yet


def test_a_process_that_does_not_listen_is_killed() -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    done = _rehearse(f"if argv[-1] == '--process_id=0':\n  {deaf}\nelse:\n  time.sleep(0.5); sys.exit(4)")
    assert done.returncode == 4


@pytest.mark.parametrize(("codes", "worst"), [((0, 0), 0), ((75, 0), 75), ((75, 75), 75), ((75, 1), 1)])
def test_the_worst_exit_code_is_returned(codes: tuple[int, int], worst: int) -> None:
    done = _rehearse(f"sys.exit({codes}[int(argv[-1][-1])])")
    assert done.returncode == worst


def test_a_death_by_signal_is_a_failure() -> None:
    done = _rehearse("os.kill(os.getpid(), signal.SIGKILL)", "--processes", "1")
    assert done.returncode == 128 + signal.SIGKILL


def test_sigterm_is_passed_on() -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\nprint('ready')\ntime.sleep(100)"
    with subprocess.Popen(_command(code), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert sorted([process.stdout.readline(), process.stdout.readline()]) == ["[0] ready\n", "[1] ready\n"]
        process.terminate()
        assert process.wait(timeout=60) == 75
        assert sorted(process.stdout.readlines()) == ["[0] saved\n", "[1] saved\n"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no command"),
        (["--processes", "2", "--"], "no command"),
        (["--processes", "0", "--", "true"], "--processes 0"),
        (["--devices", "-1", "--", "true"], "--devices -1"),
        (["--devices", "many", "--", "true"], "many"),
        (["--grace_seconds", "nan", "--", "true"], "--grace_seconds nan"),
        (["--strange", "--", "true"], "--strange"),
        (["--", "no_such_command_here"], "no_such_command_here"),
        (["--", "true", "--process_id=0"], "--process_id"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], named: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("rehearse: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
