"""The roll call: who is missing, who comes twice, who does not belong; in one line, in time, on every process."""

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cv2jax.config import UserError
from cv2jax.parallel import roll_call
from cv2jax.parallel.peers import Line, PeerError
from cv2jax.parallel.roll_call import Met, hold_roll_call, ranges

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _patience_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_LATE_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_LOOK_SECONDS", 0.02)


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def listener() -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens and takes part in no roll call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def _hold(*calls: Callable[[], Met]) -> list[Any]:
    """What each process's roll call returned or raised."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    found = [future.exception() or future.result() for future in futures]
    for line in [line for met in found if isinstance(met, Met) for line in met.lines.values()]:
        line.close()
    return found


def _process(address: str, index: int, count: int, seconds: float = 20.0, **extra: Any) -> Callable[[], Met]:
    same = extra.pop("same", {"jax": "1", "config.seed": 0})
    return lambda: hold_roll_call(address, index, count, same, seconds, **extra)


def test_all_meet_in_any_order_and_know_each_other(address: str) -> None:
    late = _process(address, 0, 3)
    found = _hold(_process(address, 2, 3), lambda: (time.sleep(0.2), late())[1], _process(address, 1, 3))
    assert all(met.hosts == {0: HOST, 1: HOST, 2: HOST} for met in found)
    assert [sorted(met.lines) for met in found] == [[0], [1, 2], [0]]


def test_one_process_is_a_run_too(address: str) -> None:
    assert hold_roll_call(address, 0, 1, {}, 1.0) == Met(hosts={0: HOST}, lines={})


def test_the_missing_are_named_to_those_who_came(address: str) -> None:
    found = _hold(_process(address, 0, 6, 0.5), _process(address, 2, 6))
    for error in found:
        assert isinstance(error, PeerError)
        assert error.exit_code == 69
        assert str(error).startswith(f"of 6 processes 1, 3-5 did not come within 0 s (here: 0 on {HOST}, 2 on {HOST})")


def test_one_that_went_again_is_missing(address: str) -> None:
    def come_and_go() -> None:
        host, port = address.split(":")
        while True:
            try:
                line = Line(socket.create_connection((host, int(port))))
                break
            except OSError:
                time.sleep(0.02)
        line.send(magic=roll_call._MAGIC, process=1, num_processes=3, host="b", same={})
        time.sleep(0.2)
        line.close()

    threading.Thread(target=come_and_go).start()
    with pytest.raises(PeerError, match=r"of 3 processes 1-2 did not come within 1 s \(here: 0 on"):
        hold_roll_call(address, 0, 3, {}, 1.0)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([(1, 4, {})], "process 1 (host {}) was started as one of 4 processes, process 0 (host {}) of 3; give all"),
        ([(1, 3, {}), (1, 3, {})], "two processes are process 1 (hosts {} and {}); give each its own --process_id"),
        (
            [(1, 3, {"same": {"jax": "2", "config.seed": 0}})],
            "process 1 (host {}) differs from process 0 (jax: '1' → '2')",
        ),
    ],
)
def test_those_that_do_not_fit_are_one_line_on_all(address: str, others: list[Any], told: str) -> None:
    calls = [_process(address, index, count, **extra) for index, count, extra in others]
    for error in _hold(_process(address, 0, 3), *calls):
        assert type(error) is UserError
        assert str(error).startswith(told.format(HOST, HOST))


def test_two_first_processes_are_one_line(address: str) -> None:
    found = _hold(_process(address, 0, 2, 1.0), _process(address, 0, 2, 1.0))
    assert any("cannot listen there (Address already in use)" in str(error) for error in found)


def test_a_stranger_is_passed_over(address: str, caplog: pytest.LogCaptureFixture) -> None:
    def knock() -> None:
        host, port = address.split(":")
        time.sleep(0.2)
        for word in (b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 1}\n', b"[1]\n", b'{"cut'):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(word)
                time.sleep(0.1)

    thread = threading.Thread(target=knock)
    thread.start()
    late = _process(address, 1, 2)
    found = _hold(_process(address, 0, 2), lambda: (thread.join(), late())[1])
    assert all(isinstance(met, Met) for met in found)


def test_a_port_of_something_else_is_one_line(listener: tuple[socket.socket, str]) -> None:
    server, address = listener

    def greet() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

    threading.Thread(target=greet, daemon=True).start()
    with pytest.raises(UserError, match=f"--coordinator {address}: what answers there is no roll call of cv2jax; give"):
        hold_roll_call(address, 1, 2, {}, 20.0)
    server.shutdown(socket.SHUT_RDWR)


def test_a_first_process_that_does_not_answer_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerError, match=f"--coordinator {address}: no answer from process 0 .*refused.*start it too"):
        hold_roll_call(address, 1, 2, {}, 0.1)


def test_a_port_that_takes_the_call_and_says_nothing_is_one_line(
    listener: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "_TELL_SECONDS", 0.1)
    with pytest.raises(PeerError, match=r"no answer from process 0 \(it does not say a word"):
        hold_roll_call(listener[1], 1, 2, {}, 0.1)


@pytest.mark.parametrize("index", [0, 1])
def test_who_is_asked_to_stop_waits_no_longer(address: str, index: int) -> None:
    with pytest.raises(PeerError, match="asked to stop while waiting") as caught:
        hold_roll_call(address, index, 2, {}, 20.0, asked=lambda: True)
    assert caught.value.exit_code == 75


def test_ranges() -> None:
    assert ranges([7, 2, 3, 4, 0]) == "0, 2-4, 7"
