"""`cv2jax prepare --part`: shards made by several machines, or twice at once, are the one machine's bytes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.data.manifest import scan_manifest
from cv2jax.data.shard_builder import PrepareOptions, ShardTask, build_shard
from cv2jax.data.shards import Corpus
from cv2jax.jobs.prepare import prepare
from tests.data.speech_files import make_lines, write_lines
from tests.jobs.test_prepare import tree


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A manifest of 40 utterances, two of them bad, in two splits, and its corpus in shards of four."""
    root = tmp_path_factory.mktemp("speech")
    lines = make_lines(root, 40, rate_hz=22050, seconds=0.5)
    lines[7]["audio"] = "wav/none.wav"
    lines.insert(3, "{not json")
    manifest = write_lines(root / "m.jsonl", lines)
    prepare(manifest, root / "out", workers=1, shard_utterances=4)
    return manifest


def task(manifest, out):
    """The shard of the first twelve lines."""
    scan = scan_manifest(manifest)
    options = PrepareOptions(rate_hz=24000, encoding="flac")
    place = {"root": str(out), "manifest": str(manifest), "split": "train", "number": 0}
    lines = {"offset": scan.offset[:12], "line": scan.line[:12]}
    return ShardTask(**place, **lines, options=options, strict=False, verify=False)


@pytest.mark.parametrize("count", [1, 3, 14])
def test_parts_and_then_the_whole_are_the_one_machines_bytes(speech, tmp_path, capsys, count):
    out, made = tmp_path / "out", 0
    for number in range(1, count + 1):
        words = ["prepare", str(speech), str(out), "--workers=1", "--shard_utterances=4"]
        assert run([*words, f"--part={number}/{count}"]) == 0
        assert f"part {number}/{count}: " in (printed := capsys.readouterr().out)
        assert "after all parts give the command without --part" in printed
        made = len(list(out.glob("shards/*")))
        with pytest.raises(UserError, match="not a prepared corpus"):
            Corpus(out)
    assert made == 10
    result = prepare(speech, out, workers=1)
    assert (result.num_shards_made, result.num_shards_kept, result.num_utterances, result.num_refused) == (0, 10, 39, 2)
    assert tree(out) == tree(speech.parent / "out")


def test_what_a_part_left_undone_the_whole_makes(speech, tmp_path):
    out = tmp_path / "out"
    made = prepare(speech, out, workers=1, shard_utterances=4, part="2/3")
    assert (made.num_shards_made, made.num_utterances, made.changed) == (3, 12, True)
    assert prepare(speech, out, workers=1, part="2/3").num_shards_kept == 3
    assert prepare(speech, out, workers=1).num_shards_made == 7
    assert tree(out) == tree(speech.parent / "out")


def test_parts_share_the_directory_but_not_with_the_whole(speech, tmp_path):
    (tmp_path / "out/.prepare").mkdir(parents=True)
    (tmp_path / "out/.prepare/.half.tmp").write_bytes(b"another part's")
    with open(tmp_path / "out/.prepare/lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another `cv2jax prepare` is at work"):
            prepare(speech, tmp_path / "out")
        prepare(speech, tmp_path / "out", workers=1, part="1/20")
        assert (tmp_path / "out/.prepare/.half.tmp").exists()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `cv2jax prepare` is at work"):
            prepare(speech, tmp_path / "out", part="1/20")


def test_a_file_system_without_locks_is_a_warning(speech, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    prepare(speech, tmp_path / "out", workers=1, shard_utterances=4)
    assert "cannot lock it (Function not implemented); run one command at a time there" in caplog.text
    assert tree(tmp_path / "out") == tree(speech.parent / "out")


def test_killed_parts_and_two_of_the_same_at_once(speech, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cv2jax.cli.main", "prepare", speech, out, "--workers=1", "--shard_utterances=4"]

    def start(part):
        return subprocess.Popen([*command, f"--part={part}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed = start("1/2")
    while killed.poll() is None and not list(out.glob("shards/*.arrayrecord")):
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert len(list(out.glob("shards/*.arrayrecord"))) < 5
    machines = [start(part) for part in ("1/2", "1/2", "2/2")]
    assert [machine.wait() for machine in machines] == [0, 0, 0]
    assert prepare(speech, out, workers=1).num_shards_made == 0
    assert tree(out) == tree(speech.parent / "out")
    assert not list(out.rglob("*.tmp"))


def test_workers_that_make_the_same_shard_at_once(speech, tmp_path):
    made = [task(speech, tmp_path / name) for name in ("alone", "together")]
    (tmp_path / "alone/.prepare").mkdir(parents=True)
    build_shard(made[0])
    for _ in range(5):
        shutil.rmtree(tmp_path / "together", ignore_errors=True)
        (tmp_path / "together/.prepare").mkdir(parents=True)
        threads = [threading.Thread(target=build_shard, args=(made[1],)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tree(tmp_path / "together") == tree(tmp_path / "alone")
        assert made[1].note_path.read_bytes() == made[0].note_path.read_bytes()
        assert sorted(path.name for path in (tmp_path / "together/shards").iterdir()) == [made[0].shard_path.name]


def test_a_worker_that_comes_second_leaves_the_firsts_note(speech, tmp_path, monkeypatch):
    (tmp_path / ".prepare").mkdir()
    first, seen = task(speech, tmp_path), []
    build_shard(first)
    monkeypatch.setattr("cv2jax.data.shard_builder._load_note", lambda *_: None)  # it looked before the first was done
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(first.note_path.exists()), replace(*names)))
    build_shard(first)
    assert seen == [True, True]


@pytest.mark.parametrize("part", ["0/3", "4/3", "a/b", "auto"])
def test_what_is_no_part_is_one_line(speech, tmp_path, capsys, part):
    assert run(["prepare", str(speech), str(tmp_path / "out"), f"--part={part}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cv2jax prepare: --part {part}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine=spark"], "engine=spark: choose local or beam"),
        (["extra"], "expected MANIFEST and OUT, got 3 arguments"),
        (["--", "--runner=FlinkRunner"], "--runner=FlinkRunner: options behind OUT are Beam's; give --engine beam"),
        (["--engine=beam", "--part=1/2"], "--part and --engine beam: choose one"),
    ],
)
def test_wrong_engines_are_one_line(speech, tmp_path, capsys, words, message):
    assert run(["prepare", str(speech), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_names_it(speech, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert run(["prepare", str(speech), str(tmp_path / "out"), "--engine=beam"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'cv2jax[beam]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
