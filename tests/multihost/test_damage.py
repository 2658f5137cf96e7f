"""A checkpoint of which one process cannot read its part: all fall back to the same step, and one says so."""

import shutil

import pytest

from cv2jax.train.audit import FILE
from tests.multihost.pod import finish
from tests.multihost.toy_pod import start
from tests.run_record import record

pytestmark = pytest.mark.multihost


def test_damage_that_one_process_sees_is_agreed_on(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    results = finish(start(whole, num_steps=12))
    assert [code for code, _ in results] == [0, 0], results
    shutil.copytree(whole, damaged)
    results = finish(start(damaged, num_steps=12, blind=(1, 12)))
    assert [code for code, _ in results] == [0, 0], results
    assert "".join(out for _, out in results).count("going on from step 8; it is kept in") == 1
    assert (damaged / "checkpoints-damaged" / "12").is_dir()
    assert (damaged / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert record(damaged) == record(whole)

    shutil.rmtree(damaged / "checkpoints" / "12")
    results = finish(start(damaged, num_steps=12, blind=(1, 8)))
    assert [code for code, _ in results] == [2, 2], results
    assert all("8 is damaged" in out and "no other can be read" in out for _, out in results)
    assert (damaged / "checkpoints" / "8").is_dir()
