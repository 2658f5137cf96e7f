"""Which part of a job this process makes, as the user or the launcher that started it says."""

import os
import urllib.error
import urllib.request

from cv2jax.config import UserError
from cv2jax.data.parts import Part, parse_part

# (number from 0, of how many), as a launcher tells each of its processes.
_LAUNCHERS = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_METADATA_SECONDS = 10.0


def choose_part(part: str | None, merge: bool) -> Part | None:
    """The part that the flags name, None for the whole job; UserError where they contradict each other."""
    if merge and part is not None:
        raise UserError(f"--part {part} --merge: first run every part, then --merge without --part")
    return None if part is None else find_part(part)


def find_part(text: str) -> Part:
    """The part that `text` names: "i/n", or "auto" for this process's place among those of its launcher.

    Slurm (`srun`), Open MPI and TPU pods are known, the last where CV2JAX_DISTRIBUTED=1; JAX's processes need not be
    joined, so none of them waits for another. Raises UserError where there is no launcher.
    """
    if text != "auto":
        return parse_part(text)
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError("--part auto: a Slurm array may run in pieces; give --part $((SLURM_ARRAY_TASK_ID + 1))/n")
    for number, count in _LAUNCHERS:
        if number in os.environ and count in os.environ:
            return _make_part(os.environ[number], os.environ[count])
    workers = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    number = os.environ.get("TPU_WORKER_ID")
    if (workers is None or number is None) and os.environ.get("CV2JAX_DISTRIBUTED") == "1":
        number, workers = _metadata("agent-worker-number"), _metadata("worker-network-endpoints")
    if not workers or number is None:
        known = "srun, mpirun, or a TPU pod with CV2JAX_DISTRIBUTED=1"
        raise UserError(f"--part auto: no launcher ({known}) tells this process's number; give --part i/n")
    in_slice = len(workers.split(","))
    slices, slice_id = _megascale("MEGASCALE_NUM_SLICES", "1"), _megascale("MEGASCALE_SLICE_ID", "0")
    try:
        return _make_part(str(int(number) + int(slice_id) * in_slice), str(in_slice * int(slices)))
    except ValueError:
        raise UserError(f"--part auto: worker {number} of slice {slice_id} of {slices}? give --part i/n") from None


def _make_part(number: str, count: str) -> Part:
    """From a number that counts from 0."""
    try:
        return parse_part(f"{int(number) + 1}/{int(count)}")
    except (ValueError, UserError):
        raise UserError(f"--part auto: the launcher says process {number} of {count}; give --part i/n") from None


def _megascale(name: str, default: str) -> str:
    """What a TPU worker knows of the slices: its environment, else on a TPU VM the metadata of the machine."""
    if name in os.environ:
        return os.environ[name]
    if "TPU_WORKER_ID" in os.environ:  # GKE
        return default
    rows = (row.partition(":") for row in (_metadata("tpu-env") or "").splitlines())
    return {key.strip(): value.strip().strip("'") for key, _, value in rows}.get(name) or default


def _metadata(key: str) -> str | None:
    """An attribute of a Google Cloud machine; None where it has none, or there is no such machine."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as JAX asks it
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError, OSError):
        return None
