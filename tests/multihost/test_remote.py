"""Two processes write one run into a bucket, are started again there, and leave what they leave on a disk."""

import pytest

from cv2jax.remote import as_path, fetched
from cv2jax.train.audit import FILE
from tests.bucket_server import environment, serving
from tests.multihost.pod import finish, start
from tests.multihost.test_pod import arguments, lines
from tests.small_corpus import make_small_corpus

pytestmark = pytest.mark.multihost


def test_two_processes_train_and_resume_in_a_bucket(tmp_path, monkeypatch):
    corpus, local = make_small_corpus(tmp_path / "corpus"), tmp_path / "local"
    words = lambda workdir, steps: arguments(corpus, workdir, f"num_steps={steps}", "save_every=2", "mesh.fsdp=2")  # noqa: E731
    assert [code for code, _ in finish(start(words(local, 4), 2, 1))] == [0, 0]
    with serving("pod-runs") as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        workdir = as_path("gs://pod-runs/lm")
        results = finish(start(words(workdir, 4), 2, 1))
        assert [code for code, _ in results] == [0, 0], results
        assert any("/checkpoints/4/state/ocdbt.process_1/" in name for name in server.buckets["pod-runs"])
        newest = [name for name in server.buckets["pod-runs"] if name.startswith("lm/checkpoints/4/")]
        for name in newest:
            del server.buckets["pod-runs"][name]
        results = finish(start(words(workdir, 4), 2, 1))
        assert [code for code, _ in results] == [0, 0], results
        there = fetched(workdir)
        assert (there / FILE).read_bytes() == (local / FILE).read_bytes()
        assert [x["loss"] for x in lines(there)] == [x["loss"] for x in lines(local)]
