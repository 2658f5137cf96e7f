"""`cv2jax prepare --engine beam`: the one machine's bytes by an Apache Beam pipeline (extra [beam])."""

import contextlib
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


def command(speech, out):
    flags = ("--shard_utterances=4", "--engine=beam", "--workers=2")
    return [sys.executable, "-m", "cv2jax.cli.main", "prepare", speech, out, *flags]


def start(speech, out):
    """The command in a session of its own, once it has made three shards; what it says goes to `said`."""
    with open(out.with_name("said"), "wb") as said:
        process = subprocess.Popen(command(speech, out), cwd=ROOT, start_new_session=True, stdout=said, stderr=said)
    while process.poll() is None and len(list(out.glob("shards/*.arrayrecord"))) < 3:
        time.sleep(0.001)
    assert process.poll() is None, out.with_name("said").read_text()
    return process


def worker_of(launcher):
    """A process of the launcher's session that runs Beam's worker."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, stat = (path / "cmdline").read_bytes().split(b"\0"), (path / "stat").read_text()
            session = int(stat.rpartition(")")[2].split()[3])
            if session == launcher.pid and b"python" in words[0] and any(b"sdk_worker_main" in word for word in words):
                return int(path.name)
    raise AssertionError("the launcher has no worker")


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
    killed = start(speech, out)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    num_left = len(list(out.glob("shards/*.arrayrecord")))
    again = subprocess.run(command(speech, out), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    num_kept = int(again.stdout.split(" shards made, ")[1].split(" kept")[0])
    assert abs(num_kept - num_left) <= 2  # a shard's note may be missing, and a killed worker ends its system call
    assert whole_tree(out) == whole_tree(speech.parent / "out")


def test_a_worker_process_that_is_killed_is_one_line_and_costs_its_shard(speech, tmp_path):
    out = tmp_path / "out"
    launcher = start(speech, out)
    try:
        os.kill(worker_of(launcher), signal.SIGKILL)
        assert launcher.wait(300) == 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    said = (tmp_path / "said").read_text()
    assert "cv2jax prepare: the pipeline failed, a worker was killed perhaps (" in said
    assert "cli/main.py" not in said  # no traceback of ours; Beam's threads print some
    assert prepare(speech, out, engine="beam", beam_options=IN_PROCESS).num_shards_kept >= 3
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

    for error in (
        UserError("shard: cannot write (No space left on device)"),
        OSError(28, "No space left on device", "shard"),
    ):
        monkeypatch.setattr("cv2jax.jobs.prepare_beam.build_shard", lambda _, error=error: (_ for _ in ()).throw(error))
        assert run([*words, "--", *IN_PROCESS]) == 2
        [line] = capfd.readouterr().err.splitlines()
        assert "No space left on device" in line
        assert line.endswith("; finished shards are kept: give the same command again")
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--runner=NoRunner", "Unexpected pipeline runner: NoRunner"),
        ("--runner=no.such.Runner", "No module named 'no'"),
        ("--runner=json.NoRunner", "no attribute 'NoRunner'"),
        ("--direct_num_workers=x", "invalid int value: 'x'"),
    ],
)
def test_what_beam_does_not_take_is_one_line(speech, tmp_path, capfd, option, reason):
    assert run(["prepare", str(speech), str(tmp_path / "out"), "--engine=beam", "--", option]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cv2jax prepare: Apache Beam does not take {option}: ")
    assert reason in line
    assert not (tmp_path / "out").exists()


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
