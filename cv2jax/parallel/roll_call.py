"""The roll call before JAX joins the processes of a run: who is missing, and who does not belong, in one line each.

It is held at the coordinator's address itself, so that no second port has to be open: process 0 listens there until all have
come, and then leaves the port to JAX. The connections stay, for `Peers`.
"""

import contextlib
import dataclasses
import errno
import json
import os
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging

from cv2jax.config import UserError, differences
from cv2jax.parallel.peers import EXIT_PREEMPTED, Line, PeerError, split_address

_MAGIC = "cv2jax roll call 1"
_LOOK_SECONDS = 0.2
_TELL_SECONDS = 5.0
_SETTLE_SECONDS = 20.0  # for the processes of a run before, which may still be ending, to leave the port
_LATE_SECONDS = 3.0  # in which those that come after a refusal are told it too

Asked = Callable[[], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Met:
    """The processes of a run: {process: host name} and lines; process 0 has one to each other, these one to it."""

    hosts: dict[int, str]
    lines: dict[int, Line]


def hold_roll_call(
    address: str,
    process_id: int,
    num_processes: int,
    same: Mapping[str, Any],
    seconds: float,
    asked: Asked = lambda: False,
) -> Met:
    """Returns once all processes have met.

    `same` holds what must not differ between them, flat and as JSON has it. Raises PeerError after `seconds` without one of
    them, or when `asked` says that this process shall stop, and UserError for processes that do not fit together.
    """
    hello = {
        "magic": _MAGIC,
        "process": process_id,
        "num_processes": num_processes,
        "host": socket.gethostname(),
        "same": json.loads(json.dumps(dict(same))),
    }
    if process_id:
        return _answer(address, hello, seconds, asked)
    if num_processes == 1:
        return Met(hosts={0: hello["host"]}, lines={})
    with _listen(address, min(seconds, _SETTLE_SECONDS)) as listener:
        return _Roll(listener, hello).gather(seconds, asked)


class _Roll:
    """Process 0's side."""

    def __init__(self, listener: socket.socket, mine: dict[str, Any]) -> None:
        self._mine, self._listener = mine, listener
        self._lines: dict[int, Line] = {}
        self._hosts: dict[int, str] = {0: mine["host"]}
        self._refusal: UserError | None = None
        self._strangers: set[str] = set()

    def gather(self, seconds: float, asked: Asked) -> Met:
        """Waits until all are there; see `hold_roll_call`."""
        kept: set[Line] = set()
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                self._wait(selector, seconds, asked)
                kept = set(self._lines.values())
            finally:
                for key in list(selector.get_map().values()):
                    if isinstance(key.fileobj, Line) and key.fileobj not in kept:
                        key.fileobj.close()
        for line in self._lines.values():
            line.send(hosts=sorted(self._hosts.items()))
        return Met(hosts=self._hosts, lines=self._lines)

    def _wait(self, selector: selectors.BaseSelector, seconds: float, asked: Asked) -> None:
        told = time.monotonic()
        end = told + seconds
        while len(self._lines) + 1 < self._mine["num_processes"] or self._refusal:
            for key, _ in selector.select(_LOOK_SECONDS):
                if not isinstance(key.fileobj, Line):
                    selector.register(Line(self._listener.accept()[0]), selectors.EVENT_READ)
                elif not self._hear(key.fileobj):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            now = time.monotonic()
            if self._refusal:
                if now > end:
                    raise self._refusal
                end = min(end, now + _LATE_SECONDS)
            elif asked() or now > end:
                self._refuse(_stopped() if asked() else self._missing(f"did not come within {seconds:.0f} s"))
                end = now  # all who are here have been told
            elif now > told + _TELL_SECONDS:
                logging.info("roll call: %s", self._missing("are not here yet"))
                told = now

    def _hear(self, line: Line) -> bool:
        """Whether to keep a line, after what came from it."""
        try:
            messages = line.receive()
            hello = messages[0] if messages else {}
            stranger = bool(messages) and hello.get("magic") != _MAGIC
        except (ValueError, AttributeError):
            messages, hello, stranger = None, {}, True
        if stranger:
            with contextlib.suppress(OSError):
                host = line.connection.getpeername()[0]
                if host not in self._strangers:
                    logging.warning("roll call: something at %s that is no process of cv2jax spoke here; ignored", host)
                self._strangers.add(host)
            return False
        if messages is None:  # it has gone, and may come again
            for process in [process for process, its in self._lines.items() if its is line]:
                del self._lines[process], self._hosts[process]
            return False
        if hello:
            self._admit(line, hello)
        return True

    def _admit(self, line: Line, hello: dict[str, Any]) -> None:
        process, mine = hello["process"], self._mine
        name = f"process {process} (host {hello['host']})"
        if not self._refusal:
            differing = differences(mine["same"], hello["same"])
            if hello["num_processes"] != mine["num_processes"]:
                counts = (
                    f"{hello['num_processes']} processes, process 0 (host {mine['host']}) of {mine['num_processes']}"
                )
                self._refuse(UserError(f"{name} was started as one of {counts}; give all the same --num_processes"))
            elif process in self._hosts and (process == 0 or self._lines[process].receive() is not None):
                both = f"hosts {self._hosts[process]} and {hello['host']}"
                self._refuse(UserError(f"two processes are process {process} ({both}); give each its own --process_id"))
            elif differing:
                shown = "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
                self._refuse(
                    UserError(f"{name} differs from process 0 ({shown}); give all the same command and versions")
                )
        if self._refusal:
            line.send(refused=str(self._refusal), code=self._refusal.exit_code)
        else:
            self._lines[process], self._hosts[process] = line, hello["host"]

    def _refuse(self, error: UserError) -> None:
        self._refusal = error
        for line in self._lines.values():
            line.send(refused=str(error), code=error.exit_code)

    def _missing(self, what: str) -> PeerError:
        count = self._mine["num_processes"]
        absent = ranges(set(range(count)) - set(self._hosts))
        here = ", ".join(f"{process} on {host}" for process, host in sorted(self._hosts.items())[:8])
        here += f" and {len(self._hosts) - 8} more" if len(self._hosts) > 8 else ""
        return PeerError(f"of {count} processes {absent} {what} (here: {here}); start them too, or see why they ended")


def _answer(address: str, hello: dict[str, Any], seconds: float, asked: Asked) -> Met:
    """The other processes' side: calls until process 0 is there, and waits for its word."""
    end, told, strange_since = time.monotonic() + seconds, False, 0.0
    while True:
        met, reason = _ask(address, hello, end + 2 * _TELL_SECONDS, asked)  # process 0 may have come a little later
        if met is not None:
            return met
        now = time.monotonic()
        strange_since = (strange_since or now) if reason == _STRANGE else 0.0
        if asked():
            raise _stopped()
        if strange_since and now > min(end, strange_since + _SETTLE_SECONDS):
            raise UserError(f"--coordinator {address}: {_STRANGE}; give a port that is free on the host of process 0")
        if now > end:
            raise PeerError(f"--coordinator {address}: no answer from process 0 ({reason}); start it too, on that host")
        if not told:  # a name may not be known yet either: a cluster's DNS learns it when process 0 starts
            logging.info("waiting for process 0 at %s (%s)", address, reason)
        told = True
        time.sleep(_LOOK_SECONDS)


def _ask(address: str, hello: dict[str, Any], end: float, asked: Asked) -> tuple[Met | None, str]:
    """What process 0 says, or None and why there is no word from it; raises what it refuses with."""
    try:
        line = Line(socket.create_connection(split_address(address), timeout=5))
    except OSError as error:
        return None, error.strerror or str(error)
    reply, reason = None, _STRANGE
    # A port of this host's own, on which nobody listens, may be given to the call itself.
    if line.connection.getsockname() != line.connection.getpeername():
        line.send(**hello)
        reply, reason = _wait_for_reply(line, end, asked)
    if reply is not None and "hosts" in reply:
        return Met(hosts=dict(map(tuple, reply["hosts"])), lines={0: line}), ""
    line.close()
    if reply is not None and "refused" in reply:
        code = reply["code"]
        raise UserError(reply["refused"]) if code == UserError.exit_code else PeerError(reply["refused"], code)
    return None, reason


_STRANGE = "what answers there is no roll call of cv2jax"


def _wait_for_reply(line: Line, end: float, asked: Asked) -> tuple[dict[str, Any] | None, str]:
    """Process 0's word, or None and why there is none."""
    while time.monotonic() < end and not asked():
        if not select.select([line], [], [], _LOOK_SECONDS)[0]:
            continue
        try:
            messages = line.receive()
        except ValueError:
            return None, _STRANGE
        if messages is None:
            return None, "it hung up"
        if messages:
            return messages[0], _STRANGE
    return None, "it does not say a word"


def _listen(address: str, seconds: float) -> socket.socket:
    """A listening socket on all interfaces, as JAX's own will be."""
    port, end = split_address(address)[1], time.monotonic() + seconds
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                mend = "give a port that is free on the host of process 0"
                raise UserError(
                    f"--coordinator {address}: cannot listen there ({os.strerror(error.errno or 0)}); {mend}"
                ) from error
            time.sleep(_LOOK_SECONDS)


def _stopped() -> PeerError:
    text = "asked to stop while waiting for the other processes; nothing is lost, start the same command again"
    return PeerError(text, EXIT_PREEMPTED)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: "0, 2-5, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
