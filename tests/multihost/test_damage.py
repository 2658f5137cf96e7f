"""A checkpoint of which one process cannot read its part: both fall back to the same step, and say so once."""

import shutil

import pytest

from cv2jax.train.audit import FILE, first_difference
from tests.multihost.pod import finish, start
from tests.multihost.test_pod import arguments, lines
from tests.small_corpus import make_small_corpus

pytestmark = pytest.mark.multihost


def test_damage_that_one_process_sees_is_agreed_on(tmp_path):
    corpus, whole, damaged = make_small_corpus(tmp_path / "corpus"), tmp_path / "whole", tmp_path / "damaged"
    words = lambda workdir: arguments(corpus, workdir, "num_steps=6", "save_every=2", "mesh.fsdp=2")  # noqa: E731
    results = finish(start(words(whole), 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    shutil.copytree(whole, damaged)
    (part,) = (damaged / "checkpoints" / "6" / "state" / "ocdbt.process_1" / "d").iterdir()
    part.write_bytes(part.read_bytes()[:1000])
    results = finish(start(words(damaged), 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    assert "".join(out for _, out in results).count("going on from step 4; it is kept in") == 1
    assert (damaged / "checkpoints-damaged" / "6").is_dir()
    assert first_difference(whole, damaged) is None
    assert (whole / FILE).read_bytes() == (damaged / FILE).read_bytes()
    same = lambda workdir: [x["loss"] for x in lines(workdir)]  # noqa: E731
    assert same(whole) == same(damaged)
