"""Rehearse a pod on one machine: the same command in several processes, each with fake CPU devices.

    python launch/rehearse.py --processes 2 --devices 4 -- cv2jax train speech_tokenizer_tiny \
        --corpus prepared/ --workdir runs/rehearsal --set mesh.fsdp=2

Each process gets --coordinator, --num_processes and --process_id, and its output is shown behind its number. When one
dies or fails it is named, with its host, and the others are stopped; nothing that they started stays. SIGTERM and SIGINT
are passed on, so that a preemption can be rehearsed too. The exit code is that of the process that failed first, else 75
(preempted, start again) if one ended with it.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

EXIT_BAD_ARGUMENTS = 2
ORDERLY_EXITS = (0, 75)  # finished; preempted: saved and to be started again
EXIT_PEER_LOST = 69  # ended because another did
CAUSE_SECONDS = 2.0  # for the process that failed first to be seen, where another has already ended because of it
GIVEN_HERE = ("--coordinator", "--num_processes", "--process_id")
SECONDS_BETWEEN_LOOKS = 0.05


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(EXIT_BAD_ARGUMENTS, f"rehearse: {message}; see --help\n")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and the command behind `--`; exits with code 2 and one line for a mistake."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2, help="processes (hosts of the pod)")
    parser.add_argument("--devices", type=int, default=4, help="fake devices of each process")
    parser.add_argument("--grace_seconds", type=float, default=30.0, help="from the first failure to SIGKILL")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start none")
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if not options.grace_seconds >= 0:
        parser.error(f"--grace_seconds {options.grace_seconds}: must not be negative")
    if not command:
        parser.error("no command: write it behind --, for example -- cv2jax train speech_tokenizer_tiny --workdir DIR")
    if shutil.which(command[0]) is None:
        parser.error(f"the command '{command[0]}' is not found; install it or give its path")
    for word in command:
        if word.split("=")[0] in GIVEN_HERE:
            parser.error(f"leave {word.split('=')[0]} out of the command: each process is given its own")
    return options, command


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands_of(command: list[str], num_processes: int) -> list[list[str]]:
    """The command of each process, with its place."""
    address = f"127.0.0.1:{free_port()}"
    place = [f"--coordinator={address}", f"--num_processes={num_processes}"]
    return [[*command, *place, f"--process_id={index}"] for index in range(num_processes)]


class Pod:
    """The processes of one rehearsal."""

    def __init__(self) -> None:
        """A pod without processes."""
        self.processes: list[subprocess.Popen[str]] = []
        self.readers: list[threading.Thread] = []

    def start(self, commands: list[list[str]], settings: dict[str, str]) -> None:
        """Starts the processes; their output goes on to ours, line by line."""
        environment = {**os.environ, **settings}
        flags = environment.pop("XLA_FLAGS", "").split()
        environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "host_platform_device_count" not in flag)
        for index, command in enumerate(commands):
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches them once, through us
            )
            reader = threading.Thread(target=_forward, args=(index, process), daemon=True)
            reader.start()
            self.processes.append(process)
            self.readers.append(reader)

    def send(self, number: int) -> None:
        """Sends a signal to every process that still runs."""
        for process in self.processes:
            if not _ended(process):
                os.kill(process.pid, number)  # Popen's own would reap it first

    def kill(self) -> None:
        """Ends every process that still runs, with its workers."""
        for process in self.processes:
            if process.returncode is None:  # not reaped: its group's number is still its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait(self, grace_seconds: float) -> int:
        """Waits for all of them, stops the rest when one fails, and returns the exit code for all."""
        while not self._failed() and not all(map(_ended, self.processes)):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        failed = self._failed()
        cause = time.monotonic() + CAUSE_SECONDS
        while failed and set(failed.values()) == {EXIT_PEER_LOST} and time.monotonic() < cause:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            failed = self._failed()
        if failed:
            first = min(failed, key=lambda index: failed[index] == EXIT_PEER_LOST)
            how = _told(failed[first])
            print(f"rehearse: process {first} (host {socket.gethostname()}) {how}: stopping the others", flush=True)
            self.send(signal.SIGTERM)
            last = time.monotonic() + grace_seconds
            while not all(map(_ended, self.processes)) and time.monotonic() < last:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        self.kill()  # with what processes left behind
        for reader in self.readers:
            reader.join(timeout=5)
        return failed[first] if failed else max(map(_code, self.processes))

    def _failed(self) -> dict[int, int]:
        """Exit codes of those that have ended other than orderly."""
        codes = {index: _code(process) for index, process in enumerate(self.processes) if _ended(process)}
        return {index: code for index, code in codes.items() if code not in ORDERLY_EXITS}


def _status(process: subprocess.Popen[str]) -> Any:
    """How a process ended, or None; it is not reaped by that, so that nothing else gets its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)


def _ended(process: subprocess.Popen[str]) -> bool:
    return process.returncode is not None or _status(process) is not None


def _code(process: subprocess.Popen[str]) -> int:
    """Exit code of an ended process; a death by signal counts as 128 + its number, as in a shell."""
    if process.returncode is not None:
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    status = _status(process)
    return status.si_status if status.si_code == os.CLD_EXITED else 128 + status.si_status


def _told(code: int) -> str:
    return f"died of {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"failed with {code}"


def _forward(index: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{index}] {line.rstrip()}", flush=True)


def main(argv: list[str]) -> int:
    """Runs the rehearsal and returns its exit code."""
    options, command = parse(argv)
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices), "PYTHONUNBUFFERED": "1"}
    commands = commands_of(command, options.processes)
    if options.dry_run:
        for each in commands:
            print(" ".join(f"{name}={value}" for name, value in settings.items()), shlex.join(each))
        return 0
    pod = Pod()

    def pass_on(number: int, frame: FrameType | None) -> None:
        pod.send(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    try:
        pod.start(commands, settings)
        return pod.wait(options.grace_seconds)
    finally:
        pod.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
