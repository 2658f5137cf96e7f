"""Joining processes: which place, whose slices, which timeouts; what cannot be joined is one line."""

import os
from typing import Any

import jax
import pytest

from cv2jax.config import UserError
from cv2jax.parallel import distributed
from cv2jax.parallel.peers import JoinOptions, PeerError
from cv2jax.parallel.roll_call import Met

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPTIONS = {"join_seconds": 7, "heartbeat_seconds": 8, "shutdown_seconds": 9}
TIMES = {"initialization_timeout": 7, "heartbeat_timeout_seconds": 38, "shutdown_timeout_seconds": 39}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the roll call and JAX; nothing is joined."""
    made: list[Any] = []

    def meet(address: str, process_id: int, num_processes: int, *rest: Any, **more: Any) -> Met:
        made.append((address, process_id, num_processes))
        return Met(hosts={0: "a"}, lines={})

    monkeypatch.setattr(distributed, "hold_roll_call", meet)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: made.append((args, kwargs)))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: made.append("left"))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "CV2JAX_", "MEGASCALE_", "JAX_COORD"))]:
        monkeypatch.delenv(name)
    return made


def _join(**options: Any) -> None:
    with distributed.joined(JoinOptions(**OPTIONS, **options)) as peers:
        peers.code = 0


def test_a_process_alone_is_left_alone(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _join()
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "0")
    _join()
    assert not calls


def test_the_place_that_is_given_is_taken_with_all_times(calls: list[Any]) -> None:
    _join(coordinator="here:12", num_processes=2, process_id=1)
    place = {"num_processes": 2, "process_id": 1}
    assert calls == [("here:12", 1, 2), (("here:12",), place | TIMES), "left"]


def test_a_launcher_that_jax_knows_is_asked_for_the_place(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "CV2JAX_DISTRIBUTED": "1"}.items():
        monkeypatch.setenv(name, value)
    _join()
    assert calls == [("node3:61441", 9, 16), ((None,), {"num_processes": None, "process_id": None} | TIMES), "left"]


def test_without_a_launcher_and_with_an_unknown_wish(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "1")
    with pytest.raises(UserError, match="CV2JAX_DISTRIBUTED=1, but JAX finds no launcher to join; unset it, or give"):
        _join()
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "yes")
    with pytest.raises(UserError, match="CV2JAX_DISTRIBUTED=yes: set it to 1"):
        _join()
    assert not calls


def test_a_launcher_of_which_jax_cannot_read_the_place_is_named(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SLURM, "CV2JAX_DISTRIBUTED": "1", "SLURM_NTASKS": "many"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"JAX cannot tell this process's place \(invalid literal .*'many'\); unset it"):
        _join()
    assert not calls


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, jax.errors.JaxRuntimeError])
def test_what_jax_says_becomes_one_line(calls: list[Any], monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise kind("it cannot be\nbecause of this and that")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(PeerError, match=r"here:12: JAX cannot join \(it cannot be\)"):
        _join(coordinator="here:12", num_processes=2, process_id=0)


@pytest.mark.parametrize(
    ("settings", "num_processes", "told"),
    [
        ({"NUM_SLICES": "2"}, 1, "MEGASCALE_NUM_SLICES set, but not MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID"),
        ({"NUM_SLICES": "2", "SLICE_ID": "2", "COORDINATOR_ADDRESS": "a"}, 4, "MEGASCALE_SLICE_ID=2 of .*=2: must be"),
        ({"NUM_SLICES": "x", "SLICE_ID": "0", "COORDINATOR_ADDRESS": "a"}, 4, "MEGASCALE_SLICE_ID=0 of .*=x: must be"),
        ({"NUM_SLICES": "2", "SLICE_ID": "0", "COORDINATOR_ADDRESS": "a"}, 1, "=2, but 1 process.* are to join; unset"),
        ({"NUM_SLICES": "2", "SLICE_ID": "0", "COORDINATOR_ADDRESS": "a"}, 6, "=2 of 4 hosts each .*, but 6 processes"),
    ],
)
def test_slices_that_never_come_are_one_line(settings: dict[str, str], num_processes: int, told: str) -> None:
    environment = {f"MEGASCALE_{name}": value for name, value in settings.items()}
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}
    with pytest.raises(UserError, match=told):
        distributed.check_slices(environment | hosts, num_processes)
    distributed.check_slices(environment | hosts | {"JAX_PLATFORMS": "cpu"}, num_processes)  # nobody reads them there


def test_slices_of_this_run_are_right() -> None:
    names = {"MEGASCALE_COORDINATOR_ADDRESS": "a:8080", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    distributed.check_slices(names | {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 8)
    distributed.check_slices({}, 3)
    assert names


def test_a_stale_slice_stops_a_process_alone(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    with pytest.raises(UserError, match="unset MEGASCALE_"):
        _join()
    assert not calls
