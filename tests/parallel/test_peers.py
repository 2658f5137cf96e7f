"""Processes that watch each other: one that dies, fails or leaves early ends the others with its name, and none hangs."""

import os
import socket
import subprocess
import sys

import pytest

from cv2jax.config import UserError
from cv2jax.parallel.peers import JoinOptions, join_options

HOST = socket.gethostname()
PROCESS = """
import ctypes, os, sys, time
from cv2jax.config import UserError
from cv2jax.parallel.peers import JoinOptions, Peers
from cv2jax.parallel.roll_call import hold_roll_call
address, count, index, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = JoinOptions(coordinator=address, num_processes=count, process_id=index, shutdown_seconds=1,
                      heartbeat_seconds=int(sys.argv[5]))
met = hold_roll_call(address, index, count, {}, 30)
peers = Peers(index, met.hosts, met.lines, options)
peers.start()
try:
    if what == "die": os.kill(os.getpid(), 9)
    if what == "mistake": raise UserError("the thing is wrong")
    if what == "defect": raise ValueError("never so")
    if what == "stop": os.kill(os.getpid(), 19)
    if what == "suffer": time.sleep(0.5); raise ValueError("the exchange broke")
    if what == "abort": ctypes.CDLL(None).abort()  # as JAX does, without Python's lock, when process 0 has gone
    if what == "preempted": peers.code = 75; peers.leave()
    time.sleep(60 if what != "well" else 0.5)
except BaseException as error:
    peers.fail(error)
    print("own words:", error, flush=True)
    sys.exit(error.exit_code if isinstance(error, UserError) else 1)
peers.leave()
peers.close()
"""


def _run(*parts: str, heartbeat_seconds: int = 45) -> list[tuple[int, str]]:
    """(exit code, output) of processes with those parts to play."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address, str(len(parts))]
    processes = [
        subprocess.Popen(
            [*command, str(i), part, str(heartbeat_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, part in enumerate(parts)
    ]
    try:
        for process, part in zip(processes, parts, strict=True):
            if part != "stop":
                process.wait(timeout=50)
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_processes_that_are_well_say_nothing() -> None:
    assert [code for code, _ in _run("well", "well", "well")] == [0, 0, 0]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_ends_all_with_its_name(dead: int) -> None:
    ends = _run(*("die" if i == dead else "go on" for i in range(3)))
    for i, (code, output) in enumerate(ends):
        assert code == (-9 if i == dead else 69), output
        if i != dead:
            assert f"cv2jax: process {dead} (host {HOST}) died; all processes of the run end" in output


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_of_one_is_told_by_all_and_starting_again_is_useless(failing: int) -> None:
    ends = _run(*("mistake" if i == failing else "go on" for i in range(2)))
    assert [code for code, _ in ends] == [2, 2]
    assert "own words: the thing is wrong" in ends[failing][1]
    assert f"process {failing} (host {HOST}) failed: the thing is wrong" in ends[1 - failing][1]


def test_a_mistake_of_all_is_told_in_own_words() -> None:
    ends = _run("mistake", "mistake")
    assert [code for code, _ in ends] == [2, 2]
    assert all("own words" in output and "cv2jax:" not in output for _, output in ends)


def test_a_defect_is_named_and_may_be_started_again() -> None:
    (code, output), (own_code, own_output) = _run("go on", "defect")
    assert (code, own_code) == (69, 1)
    assert f"process 1 (host {HOST}) failed: ValueError: never so" in output
    assert "own words: never so" in own_output


def test_of_two_defects_the_first_is_the_cause() -> None:
    """An exchange breaks where the other side fails; the one that fails first says so before it goes."""
    (code, output), (own_code, own_output) = _run("suffer", "defect")
    assert (code, own_code) == (69, 1)
    assert f"process 1 (host {HOST}) failed: ValueError: never so" in output
    assert "own words: never so" in own_output


def test_a_death_explains_the_defects_that_come_of_it() -> None:
    (code, output), _, (other_code, other_output) = _run("suffer", "die", "suffer")
    assert (code, other_code) == (69, 69)
    assert all(f"process 1 (host {HOST}) died" in text and "own words" not in text for text in (output, other_output))


def test_the_verdict_comes_before_an_abort_for_the_same_reason() -> None:
    ends = _run("die", "abort")
    assert ends[1][0] == 69
    assert f"process 0 (host {HOST}) died" in ends[1][1]


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_stops_is_missed(stopped: int) -> None:
    ends = _run(*("stop" if i == stopped else "go on" for i in range(2)), heartbeat_seconds=4)
    code, output = ends[1 - stopped]
    assert code == 69
    assert f"process {stopped} (host {HOST}) shows no life for 4 s" in output


def test_nobody_waits_for_one_that_left() -> None:
    ends = _run("go on", "preempted", "go on")
    assert [code for code, _ in ends] == [75, 75, 75]
    assert all(f"process 1 (host {HOST}) left with exit code 75 1 s before the others" in output for _, output in ends)


def test_options_come_from_flags_then_from_the_environment() -> None:
    environment = {"CV2JAX_COORDINATOR": "here:12", "CV2JAX_NUM_PROCESSES": "4", "CV2JAX_PROCESS_ID": "3"}
    options = join_options({"process_id": 0, "join_seconds": 7, "coordinator": None}, environment)
    assert options == JoinOptions(coordinator="here:12", num_processes=4, process_id=0, join_seconds=7)
    assert join_options({}, {}) == JoinOptions()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"coordinator": "here:12"}, "also give --num_processes and --process_id"),
        ({"coordinator": "here:12", "num_processes": 2, "process_id": 2}, "also give --num_processes and --process_id"),
        ({"num_processes": 2}, "need --coordinator too"),
        ({"process_id": 0}, "need --coordinator too"),
        ({"join_seconds": 0}, "--join_seconds 0: must be at least 1"),
        ({"heartbeat_seconds": -1}, "--heartbeat_seconds -1: must be at least 1"),
        *(
            ({"coordinator": address, "num_processes": 2, "process_id": 0}, f"--coordinator {address}: give host:port")
            for address in ("nocolon", "host:", "host:port", ":1234", "host:99999", "host:0")
        ),
    ],
)
def test_bad_options_are_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        join_options(given, {})


def test_an_environment_that_is_no_number_is_named() -> None:
    with pytest.raises(UserError, match="CV2JAX_JOIN_SECONDS=soon: must be a whole number"):
        join_options({}, {"CV2JAX_JOIN_SECONDS": "soon"})
    assert "CV2JAX_JOIN_SECONDS" not in os.environ
