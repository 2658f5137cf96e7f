"""`cv2jax prepare --engine beam`: the one machine's bytes by an Apache Beam pipeline (extra [beam])."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.jobs.prepare import prepare
from tests.data.speech_files import make_lines, write_lines
from tests.jobs.test_prepare import add_bad_utterances, tree

pytestmark = pytest.mark.beam

ROOT = pathlib.Path(__file__).parents[2]
IN_PROCESS = ("--runner=FnApiRunner", "--direct_running_mode=in_memory")


def whole_tree(root):
    """`tree` with the private notes too, whose stamps are of the same files."""
    return tree(root) | {str(p.relative_to(root)): p.read_bytes() for p in (root / ".prepare").iterdir()}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A manifest of 60 utterances and one of every bad kind, and its corpus in shards of four."""
    root = tmp_path_factory.mktemp("speech")
    lines = make_lines(root, 60, rate_hz=22050, seconds=2.0)
    add_bad_utterances(root, lines)
    manifest = write_lines(root / "m.jsonl", lines)
    prepare(manifest, root / "out", workers=1, shard_utterances=4)
    return manifest


def start(speech, out, *words):
    command = [sys.executable, "-m", "cv2jax.cli.main", "prepare", speech, out, "--shard_utterances=4", *words]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize(
    "options",
    [IN_PROCESS, ("--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=3")],
)
def test_a_pipeline_makes_the_one_machines_bytes(speech, tmp_path, options):
    out = tmp_path / "out"
    result = prepare(speech, out, shard_utterances=4, engine="beam", beam_options=options)
    alone = prepare(speech, speech.parent / "out", workers=1)
    assert (result.num_utterances, result.num_refused) == (alone.num_utterances, alone.num_refused)
    assert result.num_shards_made == alone.num_shards_kept > 15
    assert whole_tree(out) == whole_tree(speech.parent / "out")
    again = prepare(speech, out, engine="beam", beam_options=options)
    assert (again.num_shards_made, again.changed) == (0, False)
    assert whole_tree(out) == whole_tree(speech.parent / "out")


def test_worker_processes_make_the_one_machines_bytes_also_after_a_kill(speech, tmp_path):
    out = tmp_path / "out"
    killed = start(speech, out, "--engine=beam", "--workers=2")
    while killed.poll() is None and len(list(out.glob("shards/*.arrayrecord"))) < 3:
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    num_left = len(list(out.glob("shards/*.arrayrecord")))
    again = start(speech, out, "--engine=beam", "--workers=2")
    printed = again.communicate()[0].decode()
    assert again.returncode == 0, printed
    num_kept = int(printed.split(" shards made, ")[1].split(" kept")[0])
    assert num_left - 2 <= num_kept <= num_left  # of the shards in the making the note may be missing
    assert whole_tree(out) == whole_tree(speech.parent / "out")


def test_a_worker_process_that_is_killed_ends_the_run_which_goes_on_when_given_again(speech, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys, cv2jax.data.shard_builder as b; import cv2jax.jobs.prepare_beam as p\n"
        "from cv2jax.jobs.prepare import prepare\n"
        "if __name__ == '__main__': prepare(sys.argv[1], sys.argv[2], shard_utterances=4, engine='beam', workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, speech, out], cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and len(list(out.glob("shards/*.arrayrecord"))) < 3:
            time.sleep(0.001)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert children
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    prepare(speech, out, engine="beam", beam_options=IN_PROCESS)
    assert whole_tree(out) == whole_tree(speech.parent / "out")


def test_both_engines_and_parts_go_on_with_each_others_shards(speech, tmp_path):
    out = tmp_path / "out"
    prepare(speech, out, shard_utterances=4, workers=1, part="1/3")
    made = prepare(speech, out, engine="beam", beam_options=IN_PROCESS)
    assert 0 < made.num_shards_kept < made.num_shards_made
    assert not prepare(speech, out, workers=1).changed
    assert whole_tree(out) == whole_tree(speech.parent / "out")


def test_strict_and_a_full_disk_are_one_line(tmp_path, capfd, monkeypatch):
    lines = make_lines(tmp_path, 10)
    lines[8]["audio"] = "wav/none.wav"
    manifest, out = write_lines(tmp_path / "m.jsonl", lines), tmp_path / "out"
    words = ["prepare", str(manifest), str(out), "--shard_utterances=2", "--engine=beam", "--strict"]
    assert run([*words, "--", *IN_PROCESS]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax prepare:")]
    assert "m.jsonl:9: " in line
    assert "wav/none.wav: no such" in line
    assert len(list((out / "shards").glob("*.arrayrecord"))) >= 3

    def full(*_):
        raise UserError("shard: cannot write (No space left on device)")

    monkeypatch.setattr("cv2jax.jobs.prepare_beam.build_shard", full)
    assert run([*words, "--", *IN_PROCESS]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax prepare:")]
    assert line.endswith("shard: cannot write (No space left on device); finished shards are kept")
    assert not list(out.rglob("*.tmp"))


def test_an_unknown_runner_is_named(speech, tmp_path):
    with pytest.raises(UserError, match="NoRunner"):
        prepare(speech, tmp_path / "out", engine="beam", beam_options=["--runner=NoRunner"])


def test_beam_lives_with_what_training_uses():
    code = (
        "import apache_beam, jax, orbax.checkpoint, tensorboardX, grain, json, importlib.metadata as m\n"
        "import google.protobuf, tempfile, jax.numpy as jnp\n"
        "from orbax.checkpoint import v1 as ocp\n"
        "d = tempfile.mkdtemp()\n"
        "ocp.save_pytree(d + '/c', {'a': jnp.arange(3)}); assert ocp.load_pytree(d + '/c')['a'].sum() == 3\n"
        "w = tensorboardX.SummaryWriter(d); w.add_scalar('x', 1.0, 0); w.close()\n"
        "print(json.dumps({n: m.version(n) for n in ('apache-beam', 'protobuf', 'numpy', 'jax')}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["apache-beam"]
