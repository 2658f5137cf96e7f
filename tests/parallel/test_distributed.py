"""Joining processes: what cannot be joined is one line, before JAX aborts the process."""

import socket

import jax
import pytest

from cv2jax.config import UserError
from cv2jax.parallel import distributed


@pytest.fixture
def joined(monkeypatch):
    """What reached JAX; nothing is joined."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.delenv("CV2JAX_DISTRIBUTED", raising=False)
    monkeypatch.setattr(distributed, "_JOIN_SECONDS", 0.0)
    return calls


def test_a_process_alone_is_left_alone(joined, monkeypatch):
    distributed.initialize()
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "0")
    distributed.initialize()
    assert not joined


@pytest.mark.parametrize("address", ["nocolon", "host:", "host:port", ":1234", "host:99999", "host:0"])
def test_a_wrong_address_is_named(joined, address):
    with pytest.raises(UserError, match=f"--coordinator {address}: give host:port"):
        distributed.initialize(address, 2, 0)
    assert not joined


def test_a_coordinator_that_never_answers_is_named(joined):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator {address}: no answer .*start process 0"):
            distributed.initialize(address, 2, 1)
        assert not joined
        closed.listen()
        distributed.initialize(address, 2, 1)
    assert joined == [((address,), {"num_processes": 2, "process_id": 1})]


def test_flags_without_an_address_and_an_unknown_wish(joined, monkeypatch):
    with pytest.raises(UserError, match="need --coordinator too"):
        distributed.initialize("", 2, 0)
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "yes")
    with pytest.raises(UserError, match="CV2JAX_DISTRIBUTED=yes: set it to 1"):
        distributed.initialize()
    assert not joined


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_what_jax_says_becomes_one_line(monkeypatch, kind):
    def refuse(*args, **kwargs):
        raise kind("it cannot be\nbecause of this and that")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("CV2JAX_DISTRIBUTED", "1")
    with pytest.raises(
        UserError, match=r"CV2JAX_DISTRIBUTED=1, but JAX finds no launcher .*\(it cannot be\); unset it"
    ):
        distributed.initialize()
    with pytest.raises(UserError, match=r"--coordinator here:12: cannot join \(it cannot be\)"):
        distributed.initialize("here:12", 2, 0)
