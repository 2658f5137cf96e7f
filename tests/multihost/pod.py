"""A pod on one machine: several processes with fake devices run the real command line."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(arguments: list[str], num_processes: int, devices_each: int) -> list[subprocess.Popen]:
    """Starts `cv2jax arguments` as `num_processes` joined processes."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices_each),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": str(ROOT),
    }
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for process_id in range(num_processes):
        joined = ["--coordinator", address, "--num_processes", str(num_processes), "--process_id", str(process_id)]
        command = [sys.executable, "-m", "cv2jax.cli.main", *arguments, *(joined if num_processes > 1 else [])]
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str]]:
    """(exit code, output) of each; kills all of them when one does not end in time."""
    try:
        return [(p.wait(timeout), out) for p in processes for out in [p.communicate(timeout=timeout)[0]]]
    finally:
        for p in processes:
            p.kill()
