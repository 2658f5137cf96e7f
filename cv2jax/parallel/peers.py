"""The processes of a run as each other's watch: one that dies or fails ends all of them, with its name, at once.

Process 0 keeps the connection of the roll call to every other. The kernel closes it when a process dies; one that stops, or
whose machine goes, is missed within `heartbeat_seconds`. Process 0 tells the others. Nothing waits for JAX's own heartbeats,
which know no host names and end a process with a page of C++ log.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from cv2jax.config import UserError

EXIT_PEER_LOST = 69  # sysexits' EX_UNAVAILABLE: another process is missing or gone; the same command goes on
EXIT_PREEMPTED = 75
_OWN_WORDS_SECONDS = (
    5.0  # for a process to fail in its own words after another has failed: often all have the same mistake
)
_EXPLAINED_SECONDS = 2.0  # for the news that another process died, which explains why an exchange with it broke
_LOOK_SECONDS = 0.5
_MAX_MESSAGE_BYTES = 1 << 20


class PeerError(UserError):
    """Another process is missing or gone: no mistake in the command, which may be given again."""

    def __init__(self, message: str, exit_code: int = EXIT_PEER_LOST) -> None:
        """One line, and the code of the exit that it leads to."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """How a process finds the others of its run, and how long it waits; the flags of `cv2jax train` explain them."""

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    join_seconds: int = 300
    heartbeat_seconds: int = 45
    shutdown_seconds: int = 60

    def validate(self) -> None:
        """Raises UserError for an address that is half given and for times that are not positive."""
        if self.coordinator:
            if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
                raise UserError(
                    f"--coordinator {self.coordinator}: also give --num_processes and --process_id (0 … num_processes-1)"
                )
            split_address(self.coordinator)
        elif self.num_processes or self.process_id >= 0:
            raise UserError("--num_processes and --process_id need --coordinator too: host:port of process 0")
        for name in ("join_seconds", "heartbeat_seconds", "shutdown_seconds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def join_options(given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> JoinOptions:
    """Options from flags, where they are not None, else from CV2JAX_COORDINATOR and so on; UserError for what is no number."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(JoinOptions):
        name = f"CV2JAX_{field.name.upper()}"
        if given.get(field.name) is not None:
            values[field.name] = given[field.name]
        elif environment.get(name):
            try:
                values[field.name] = type(field.default)(environment[name])
            except ValueError:
                raise UserError(f"{name}={environment[name]}: must be a whole number") from None
    options = JoinOptions(**values)
    options.validate()
    return options


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"; UserError for anything else."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {address}: give host:port of process 0, for example 10.0.0.1:1234")
    return host, int(port)


class Line:
    """A connection that carries small JSON objects, one a line, and never waits."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connection."""
        connection.setblocking(False)
        self.connection, self._unread = connection, b""

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        """Sends a message; one that has no reader any more is lost."""
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            while data and select.select([], [self], [], 5)[1]:
                data = data[self.connection.send(data) :]

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, None when the other end has gone; ValueError for what is no message of ours."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._unread += data
        if self._unread[:1] != b"{" or len(self._unread) > _MAX_MESSAGE_BYTES:
            raise ValueError
        *whole, self._unread = self._unread.split(b"\n")
        return [json.loads(message) for message in whole]

    def keep_alive(self, seconds: int) -> None:
        """Has the kernel ask the other machine for life: one that has gone closes the line within about `seconds`."""
        options = {"TCP_KEEPIDLE": seconds // 4, "TCP_KEEPINTVL": seconds // 12, "TCP_KEEPCNT": 5}
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                self.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))

    def close(self) -> None:
        """Hangs up."""
        self.connection.close()


class Peers:
    """The other processes of a run, watched by a thread; `code` is what this one will end with, for those it leaves behind.

    `lines` are to all others in process 0, and to process 0 elsewhere; `hosts` are the names of all. Process 0 judges why a
    run ends: a death explains all that fails because of it.
    """

    def __init__(
        self, process_id: int, hosts: Mapping[int, str], lines: Mapping[int, Line], options: JoinOptions
    ) -> None:
        """Peers nobody watches yet."""
        self.code = 0
        self._process_id, self._hosts, self._lines, self._options = process_id, hosts, dict(lines), options
        self._left: dict[int, tuple[float, int]] = {}  # process → when it said that it leaves, and its code
        self._suspicion: tuple[float, _Verdict] | None = None  # what ends the run then, unless it is explained before
        self._closed, self._judged = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cv2jax peers", daemon=True)

    def start(self) -> None:
        """Watches from here on."""
        if not self._lines:
            return
        self._wake, self._woken = socket.socketpair()
        for line in self._lines.values():
            line.keep_alive(self._options.heartbeat_seconds)
        self._heard = dict.fromkeys(self._lines, time.monotonic())
        _hold_abort()
        self._thread.start()

    def leave(self) -> None:
        """Tells the others that this process is done, with `code`; they are watched until `close`."""
        self._left[self._process_id] = (time.monotonic(), self.code)
        self._tell(leaving=self.code)

    def close(self) -> None:
        """Watches no more."""
        if not self._lines:
            return
        self._closed = True
        self._wake.send(b"x")
        self._thread.join()
        for end in (self._wake, self._woken, *self._lines.values()):
            end.close()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process fails of `error`, and has it exit past JAX, which would wait for them.

        What looks like a defect may come of another's death, which then ends this process instead, with the better words.
        """
        if not self._lines:
            return
        message, code = (str(error).splitlines() or [""])[0][:300], _exit_code(error)
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
        atexit.register(self._exit, code)
        if self._process_id == 0:
            self._hear_failure(0, message, code)
        else:
            self._tell(failed=message, code=code)
        if code == 1:
            self._judged.wait(2 * _EXPLAINED_SECONDS)  # a verdict on another ends the process here
        threading.Thread(target=lambda: (time.sleep(15), self._exit(code)), daemon=True).start()  # threads may not end

    def _suspect(self, verdict: "_Verdict", seconds: float) -> None:
        self._suspicion = self._suspicion or (time.monotonic() + seconds, verdict)

    def _name(self, process: int) -> str:
        return f"process {process} (host {self._hosts.get(process, 'unknown')})"

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    def _watch(self) -> None:
        told = looked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for process, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, process)
            while not self._closed and not self._judged.is_set():
                for key, _ in selector.select(timeout=0.1 if self._suspicion else _LOOK_SECONDS):
                    if key.data is not None and not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - told > self._options.heartbeat_seconds / 5:
                    told = now
                    self._tell(alive=True)
                if now - looked > self._options.heartbeat_seconds / 2:  # it is this process that was stopped
                    self._heard = dict.fromkeys(self._lines, now)
                looked = now
                self._look_for_silent_ones()
                self._look_for_late_ones()
                if self._suspicion and time.monotonic() > self._suspicion[0]:
                    self._judge(self._suspicion[1])

    def _hear(self, process: int) -> bool:
        """Whether the line to a process still stands, after what came from it."""
        try:
            messages = self._lines[process].receive()
        except ValueError:
            messages = None
        if messages is None:
            if process not in self._left and not self._closed:
                self._judge(_Verdict(process=process, text=f"{self._name(process)} died", code=EXIT_PEER_LOST))
            return False
        self._heard[process] = time.monotonic()
        for message in messages:
            if "text" in message:
                self._judge(_Verdict(**message))
            elif "leaving" in message:
                self._left[process] = (time.monotonic(), message["leaving"])
            elif "failed" in message:
                self._hear_failure(process, message["failed"], message["code"])
        return True

    def _hear_failure(self, process: int, message: str, code: int) -> None:
        self._left[process] = (float("inf"), code)
        mistake = code == UserError.exit_code
        verdict = _Verdict(
            process=process,
            text=f"{self._name(process)} failed: {message}",
            code=code if mistake else EXIT_PEER_LOST,
        )
        self._suspect(verdict, _OWN_WORDS_SECONDS if mistake else _EXPLAINED_SECONDS)

    def _look_for_silent_ones(self) -> None:
        """Ends the processes when one is there but does nothing: it is stopped, or hangs where nothing else of it can run."""
        seconds = self._options.heartbeat_seconds
        for process in self._heard.keys() - self._left.keys():
            if time.monotonic() - self._heard[process] > seconds:
                text = f"{self._name(process)} shows no life for {seconds} s (--heartbeat_seconds)"
                self._judge(_Verdict(process=process, text=text, code=EXIT_PEER_LOST))

    def _look_for_late_ones(self) -> None:
        """Ends the processes that go on although one left them long ago: they would wait for it for ever."""
        left = dict(self._left)
        gone = len(left) == len(self._hosts) if self._process_id == 0 else self._process_id in left
        if gone or not left:
            return
        process, (when, code) = min(left.items(), key=lambda item: item[1])
        if time.monotonic() - when > self._options.shutdown_seconds:
            seconds, preempted = self._options.shutdown_seconds, code == EXIT_PREEMPTED
            text = f"{self._name(process)} left with exit code {code} {seconds} s before the others"
            self._judge(_Verdict(process=-1, text=text, code=EXIT_PREEMPTED if preempted else EXIT_PEER_LOST))

    def _judge(self, verdict: "_Verdict") -> None:
        """Prints why the run ends and ends this process; the one whose failure it is says it itself."""
        if self._process_id == 0:
            self._tell(**dataclasses.asdict(verdict))
        if verdict.process == self._process_id:
            self._judged.set()
            return
        mend = "" if verdict.code == UserError.exit_code else ": start the same command again"
        line = f"cv2jax: {verdict.text}; all processes of the run end with it (exit code {verdict.code}){mend}\n"
        self._lines.pop(verdict.process, None)  # it will not hang up
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # not print: its lock may be held by the thread that hangs
        self._exit(verdict.code)

    def _exit(self, code: int) -> None:
        """Ends the process without JAX's farewell; process 0 after the others, whose JAX dies of its going."""
        deadline = time.monotonic() + _OWN_WORDS_SECONDS + 2
        for line in self._lines.values() if self._process_id == 0 else ():
            while _stands(line) and time.monotonic() < deadline:
                time.sleep(0.02)
        flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Verdict:
    """Why a run ends: the process whose doing it is (-1: none in particular), what to print, and the code of the exit."""

    process: int
    text: str
    code: int


def _hold_abort() -> None:
    """Lets the watching thread speak first when JAX aborts this process because the coordinator's process died.

    Both learn of it in the same instant. The handler is C's sleep(), which may be called there, and to which the number
    of SIGABRT is six seconds; then the process aborts as ever.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _stands(line: Line) -> bool:
    try:
        return line.receive() is not None
    except ValueError:
        return False


def _exit_code(error: BaseException) -> int:
    """What `cv2jax` will exit with for an error."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return UserError.exit_code if isinstance(error, OSError) and isinstance(error.filename, str) else 1
