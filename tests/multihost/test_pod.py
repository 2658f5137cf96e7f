"""Several processes as one: the same batches on any number of hosts, resume across host counts, SIGTERM to one of them."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests.multihost.pod import finish, start
from tests.small_corpus import SMALL_RUN, make_small_corpus
from tests.small_flow_run import SMALL_FLOW, make_small_flow_corpus, tokens_of
from tests.small_token_corpus import SMALL_LM, make_small_token_corpus

pytestmark = pytest.mark.multihost
SMALL = [*SMALL_RUN, "log_every=1", "evaluate_every=3", "save_every=3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_corpus(tmp_path_factory.mktemp("corpus") / "prepared")


def arguments(corpus, workdir, *sets, preset="speech_tokenizer_tiny", small=SMALL):
    flags = [f"--set={s}" for s in (*small, *sets)]
    return ["train", preset, f"--corpus={corpus}", f"--workdir={workdir}", *flags]


def lines(workdir, kind="train"):
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, text) if x["kind"] == kind]


def run(corpus, workdir, num_processes, devices_each, *sets, **preset):
    results = finish(start(arguments(corpus, workdir, *sets, **preset), num_processes, devices_each))
    assert [code for code, _ in results] == [0] * num_processes, "\n".join(out for _, out in results)
    return results


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    run(corpus, workdir, 1, 4, "num_steps=6")
    return workdir


@pytest.mark.parametrize(("num_processes", "mesh"), [(2, "mesh.fsdp=4"), (4, "mesh.tensor=2")])
def test_more_processes_train_the_same_run(corpus, alone, tmp_path, num_processes, mesh):
    run(corpus, tmp_path, num_processes, 4 // num_processes, "num_steps=6", mesh)
    ours, theirs = lines(tmp_path), lines(alone)
    assert [x["batch_hash"] for x in ours] == [x["batch_hash"] for x in theirs]
    np.testing.assert_allclose([x["loss"] for x in ours[:3]], [x["loss"] for x in theirs[:3]], rtol=1e-5)
    assert [x["step"] for x in lines(tmp_path, "evaluate")] == [3, 6]


def test_a_run_of_two_processes_goes_on_as_one(corpus, alone, tmp_path):
    run(corpus, tmp_path, 2, 2, "num_steps=6", "save_every=3")
    # The last checkpoint is taken away, as if the run had been killed after step 3.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    run(corpus, tmp_path, 1, 1, "num_steps=6")
    ours, theirs = lines(tmp_path), lines(alone)
    assert [x["batch_hash"] for x in ours] == [x["batch_hash"] for x in theirs]
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=1e-4)


def test_sigterm_to_one_process_stops_both_at_the_same_step(corpus, tmp_path):
    processes = start(arguments(corpus, tmp_path, "num_steps=100000", "evaluate_every=100000"), 2, 1)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((tmp_path / "metrics.jsonl").exists() and lines(tmp_path)):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.5)
    os.kill(processes[1].pid, signal.SIGTERM)
    results = finish(processes, timeout=120)
    assert [code for code, _ in results] == [75, 75], "\n".join(out for _, out in results)
    saved = {re.search(r"step (\d+) is saved", out).group(1) for _, out in results}
    assert len(saved) == 1
    assert (tmp_path / "checkpoints" / saved.pop()).is_dir()


def test_a_bad_mesh_is_one_line_on_every_process(corpus, tmp_path):
    results = finish(start(arguments(corpus, tmp_path, "num_steps=6", "mesh.fsdp=3"), 2, 1))
    assert [code for code, _ in results] == [2, 2]
    assert all("does not divide the 2 devices" in out and "Traceback" not in out for _, out in results)


def same_runs(corpus, tmp_path, preset, small, *, resume=True):
    """(workdir of one process, those of two and of one that went on from their first checkpoint): the same run."""
    options = {"preset": preset, "small": [*small, "log_every=1", "evaluate_every=3", "save_every=3"]}
    alone, pod, resumed = (tmp_path / name for name in ("alone", "pod", "resumed"))
    run(corpus, alone, 1, 4, "num_steps=6", **options)
    run(corpus, pod, 2, 2, "num_steps=6", "mesh.fsdp=4", **options)
    others = (pod,)
    if resume:
        others = (pod, resumed)
        shutil.copytree(pod, resumed)
        shutil.rmtree(resumed / "checkpoints" / "6")
        run(corpus, resumed, 1, 1, "num_steps=6", **options)
    theirs = lines(alone)
    for workdir in others:
        ours = lines(workdir)
        assert [x["batch_hash"] for x in ours] == [x["batch_hash"] for x in theirs]
        np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=1e-4)
    return alone, others


def test_the_packed_language_model_is_the_same_run_on_more_processes(tmp_path):
    corpus = make_small_token_corpus(tmp_path / "tokens")
    alone, others = same_runs(corpus, tmp_path, "text_speech_lm_tiny", SMALL_LM)
    held_out = lines(alone, "evaluate")[0]
    for workdir in others:
        np.testing.assert_allclose(lines(workdir, "evaluate")[0]["nll"], held_out["nll"], rtol=1e-4)
    # What is said freely is also decoded by both processes together.
    assert {key for key in lines(others[0], "evaluate")[0] if key.startswith("streamed_")} >= {"streamed_length_error"}


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_flow_is_the_same_run_on_more_processes(tmp_path, resume):
    corpus = make_small_flow_corpus(tmp_path / "corpus")
    small = [*SMALL_FLOW, f"data.speech_tokens={tokens_of(corpus)}", "data.num_buckets=1"]
    alone, others = same_runs(corpus, tmp_path, "flow_matching_tiny", small, resume=resume)
    for workdir in others:
        for name in ("loss", "streamed_mel_l1", "constant_mel_l1"):
            got, want = ([x[name] for x in lines(each, "evaluate")] for each in (workdir, alone))
            np.testing.assert_allclose(got, want, rtol=1e-3)
