"""Several processes as one: start-up, which rows of a batch a process holds, and agreement to stop."""

import os
import socket
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cv2jax.config import UserError
from cv2jax.parallel.sharding import batch_sharding, num_batch_shards

_JOIN_SECONDS = 300.0  # as long as JAX itself waits for the others


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a run; call it before anything touches a device.

    With no arguments it joins when a launcher says so (a TPU pod, Slurm or Open MPI is recognised by JAX itself when
    CV2JAX_DISTRIBUTED=1), and otherwise leaves the process alone. Raises UserError for an address that is half given,
    wrong or never answers, and for CV2JAX_DISTRIBUTED=1 where JAX finds no launcher.
    """
    asked = os.environ.get("CV2JAX_DISTRIBUTED", "")
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator {coordinator}: also give --num_processes and --process_id (0 … num_processes-1)"
            )
        _check_coordinator(coordinator, wait=process_id > 0)
        try:
            jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)
        except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
            mend = "give the same free host:port of process 0 to every process"
            raise UserError(f"--coordinator {coordinator}: cannot join ({_first_line(error)}); {mend}") from error
    elif num_processes or process_id >= 0:
        raise UserError("--num_processes and --process_id need --coordinator too: host:port of process 0")
    elif asked == "1":
        try:
            jax.distributed.initialize()
        except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
            mend = "unset it, or give --coordinator, --num_processes and --process_id to every process"
            raise UserError(
                f"CV2JAX_DISTRIBUTED=1, but JAX finds no launcher to join ({_first_line(error)}); {mend}"
            ) from error
    elif asked not in ("", "0"):
        raise UserError(f"CV2JAX_DISTRIBUTED={asked}: set it to 1 to join a launcher's processes, or unset it")


def _check_coordinator(coordinator: str, *, wait: bool) -> None:
    """UserError for a wrong address and, with `wait`, for one where nothing answers: JAX would abort the process."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator}: give host:port of process 0, for example 10.0.0.1:1234")
    last, told = time.monotonic() + _JOIN_SECONDS, False
    while wait:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            if time.monotonic() >= last:
                mend = "start process 0 too, and give its address and a port that other machines may reach"
                raise UserError(f"--coordinator {coordinator}: no answer ({reason}); {mend}") from error
            if not told:  # a name may not be known yet either: a cluster's DNS learns it when process 0 starts
                logging.info("waiting for process 0 at %s (%s)", coordinator, reason)
            told = True
            time.sleep(0.5)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Sorted rows of a global batch [B] that this process's devices hold; a tensor axis makes processes share."""
    if batch_size % num_batch_shards(mesh):
        raise UserError(
            f"a batch of {batch_size} rows does not divide over data × fsdp = {num_batch_shards(mesh)} devices; "
            f"set data.batch_multiple (language model: data.batch_rows) to a multiple of {num_batch_shards(mesh)}"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices if index is not None]))


def global_batch(mesh: Mesh, local: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """The global arrays of a batch from this process's rows (in `local_rows` order), sharded over their first axis."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in local.items()
    }


def to_host(tree: Any) -> Any:
    """Numpy copies of a pytree of replicated or fully addressable arrays; all copies start before the first is awaited."""
    return jax.device_get(tree)


def reached_stop(step: int) -> bool:
    """Whether SIGTERM reached any process and this is the step at which all of them stop; call it once a step on each."""
    return multihost_utils.reached_preemption_sync_point(step)


def from_first_process(value: bool) -> bool:
    """The first process's value on every process: for what only it can know, such as what its record holds."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
