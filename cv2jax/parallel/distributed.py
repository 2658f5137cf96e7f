"""Several processes as one: joining and leaving, which rows of a batch a process holds, and agreement to stop."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import cv2jax
from cv2jax.config import UserError
from cv2jax.parallel.compile_cache import share_compiled
from cv2jax.parallel.peers import JoinOptions, PeerError, Peers
from cv2jax.parallel.roll_call import hold_roll_call
from cv2jax.parallel.sharding import batch_sharding, num_batch_shards

# JAX's own timeouts are the second line of defence: `Peers` sees earlier, and names, what they would end without a name.
_JAX_LATER_SECONDS = 30


@contextlib.contextmanager
def joined(
    options: JoinOptions,
    same: Mapping[str, Any] | None = None,
    compiled: pathlib.Path | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> Iterator[Peers]:
    """Joins the processes of a run for a `with` block; enter it before anything touches a device.

    Without a coordinator it joins when a launcher says so (with CV2JAX_DISTRIBUTED=1 JAX recognises a TPU pod, Slurm, Open
    MPI), and otherwise leaves the process alone. `same`, flat, must be equal in all of them; `compiled` is a directory of this
    run that all see, for the programs that the first compiles; `asked` ends the wait. Give what it yields the `code` of the
    exit. Raises UserError for processes that do not fit together, PeerError for those that do not come. Inside, a process
    that dies or fails ends all others with its name.
    """
    place = _place(options)
    check_slices(os.environ, place[1] if place else 1)
    if place is None:
        yield Peers(0, {0: ""}, {}, options)
        return
    address, num_processes, process_id = place
    versions = {"cv2jax": cv2jax.__version__, "jax": jax.__version__}
    met = hold_roll_call(
        address, process_id, num_processes, {**versions, **(same or {})}, float(options.join_seconds), asked
    )
    peers = Peers(process_id, met.hosts, met.lines, options)
    peers.start()
    try:
        _initialize(options)
        if compiled is not None and num_processes > 1:
            share_compiled(compiled, first=process_id == 0)
        yield peers
    except BaseException as error:
        peers.fail(error)
        raise
    peers.leave()
    jax.distributed.shutdown()
    peers.close()


def _place(options: JoinOptions) -> tuple[str, int, int] | None:
    """(address of process 0, number of processes, this one), None for a process alone; UserError where there is no launcher."""
    if options.coordinator:
        return options.coordinator, options.num_processes, options.process_id
    asked = os.environ.get("CV2JAX_DISTRIBUTED", "")
    if asked in ("", "0"):
        return None
    if asked != "1":
        raise UserError(f"CV2JAX_DISTRIBUTED={asked}: set it to 1 to join a launcher's processes, or unset it")
    mend = "unset it, or give --coordinator, --num_processes and --process_id to every process"
    try:
        # What jax.distributed.initialize() asks for the place of a process; it is needed before, for the roll call.
        from jax._src import clusters

        address, num_processes, process_id, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, options.join_seconds
        )
    except (ImportError, LookupError, ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"CV2JAX_DISTRIBUTED=1, but JAX cannot tell this process's place ({_first_line(error)}); {mend}"
        ) from error
    if address is None or num_processes is None or process_id is None:
        raise UserError(f"CV2JAX_DISTRIBUTED=1, but JAX finds no launcher to join; {mend}")
    return address, num_processes, process_id


def _initialize(options: JoinOptions) -> None:
    given = bool(options.coordinator)
    try:
        jax.distributed.initialize(  # where a launcher is, JAX finds the place again itself, and which devices are whose
            options.coordinator or None,
            num_processes=options.num_processes if given else None,
            process_id=options.process_id if given else None,
            initialization_timeout=options.join_seconds,
            heartbeat_timeout_seconds=options.heartbeat_seconds + _JAX_LATER_SECONDS,
            shutdown_timeout_seconds=options.shutdown_seconds + _JAX_LATER_SECONDS,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise PeerError(
            f"{options.coordinator or 'CV2JAX_DISTRIBUTED=1'}: JAX cannot join ({_first_line(error)})"
        ) from error


def check_slices(environment: Mapping[str, str], num_processes: int) -> None:
    """UserError for settings of several TPU slices that are not whole, or not those of this run: a slice never comes.

    libtpu reads MEGASCALE_* by itself; left from a run before, they have it wait for slices that are gone.
    """
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return
    names = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    given = {name: environment[name] for name in names if environment.get(name)}
    if not given:
        return
    mend = "unset MEGASCALE_* if this run has one slice"
    if len(given) < len(names):
        raise UserError(f"{', '.join(given)} set, but not {', '.join(n for n in names if n not in given)}; {mend}")
    count, own = given[names[1]], given[names[2]]
    if not count.isdecimal() or not own.isdecimal() or not int(own) < int(count):
        raise UserError(f"MEGASCALE_SLICE_ID={own} of MEGASCALE_NUM_SLICES={count}: must be 0 … slices-1; {mend}")
    if num_processes % int(count):
        raise UserError(f"MEGASCALE_NUM_SLICES={count}, but {num_processes} process(es) are to join; {mend}")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if hosts and num_processes != len(hosts) * int(count):
        raise UserError(
            f"MEGASCALE_NUM_SLICES={count} of {len(hosts)} hosts each (TPU_WORKER_HOSTNAMES), but {num_processes} "
            f"processes are to join; {mend}, or start the command on every host of every slice"
        )


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
