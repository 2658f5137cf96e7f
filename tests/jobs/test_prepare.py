import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile

from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.data.shards import Corpus
from cv2jax.jobs.prepare import prepare
from cv2jax.text.characters import normalize_transcript
from tests.data.speech_files import make_lines, make_waveform, write_lines, write_speech


def tree(root):
    """Every file of a corpus but the private notes, which hold times of change."""
    files = (path for path in pathlib.Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files if ".prepare" not in path.parts}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A manifest of 60 utterances in two splits, and its corpus in shards of four."""
    root = tmp_path_factory.mktemp("speech")
    manifest = write_lines(root / "m.jsonl", make_lines(root, 60, rate_hz=22050, seconds=2.0))
    prepare(manifest, root / "out", workers=1, shard_utterances=4)
    return manifest


def test_round_trip(speech):
    corpus = Corpus(speech.parent / "out")
    corpus.verify()
    train, test = corpus.split("train"), corpus.split("test")
    assert (len(train), len(test)) == (48, 12)
    assert [record.id for record in train][:4] == ["u1", "u2", "u3", "u4"]
    assert train.read(0).text == "Word 1."
    assert test.read(0).text is None
    assert corpus.index["splits"]["train"]["num_speakers"] == 3
    np.testing.assert_array_equal(train.num_samples, [len(record.waveform) for record in train])
    assert train.num_characters.tolist() == [6 if i % 4 else 0 for i in range(60) if i % 5]
    report = json.loads((speech.parent / "out/report.json").read_text())
    assert report["num_refused"] == report["num_warnings"] == 0
    assert report["kept"]["train"]["num_utterances"] == 48


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(speech, tmp_path, workers):
    result = prepare(speech, tmp_path / "out", workers=workers, shard_utterances=4)
    assert tree(tmp_path / "out") == tree(speech.parent / "out")
    assert (result.num_utterances, result.num_shards_made, result.workers) == (60, 15, workers)
    assert 0 < result.peak_worker_bytes < 2**30
    assert result.speech_seconds == pytest.approx(120.0, rel=1e-3)


def test_second_run_does_nothing_and_says_so(speech, capsys):
    out = speech.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run(["prepare", str(speech), str(out), "--workers=1"]) == 0
    assert "up to date: nothing to do (60 utterances" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    before.pop(out / ".prepare/lock"), after.pop(out / ".prepare/lock")
    assert after == before


def start(speech, out):
    command = [sys.executable, "-m", "cv2jax.cli.main", "prepare", speech, out, "--workers=2", "--shard_utterances=4"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(speech, tmp_path):
    out, num_killed = tmp_path / "out", 0
    for num_shards in (0, 2, 5):
        process = start(speech, out)
        while process.poll() is None and len(list(out.glob("shards/*"))) <= num_shards:
            time.sleep(0.001)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            num_killed += 1
            with pytest.raises(UserError, match="not a prepared corpus"):
                Corpus(out)
    assert num_killed >= 2  # on a busy machine one may come too late
    (out / "index.json").unlink(missing_ok=True)
    time.sleep(0.2)  # the killed runs' workers end by themselves
    result = prepare(speech, out, workers=2, shard_utterances=4)
    assert result.num_shards_kept > 0
    assert result.num_shards_kept + result.num_shards_made == 15
    assert tree(out) == tree(speech.parent / "out")
    assert not list(out.rglob("*.tmp"))


def test_half_written_and_damaged_files_are_redone(speech, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(speech.parent / "out", out)
    cut, changed = out / "shards/train-00001.arrayrecord", out / "shards/train-00002.arrayrecord"
    cut.write_bytes(cut.read_bytes()[:1000])
    data = bytearray(changed.read_bytes())
    data[500:520] = bytes(20)
    changed.write_bytes(data)
    (out / ".prepare/train-00003.json").write_text('{"fingerprint": ')
    (out / "shards/.train-00004.arrayrecord.1.tmp").write_bytes(b"half")
    (out / "index/train.speaker.npy").unlink()
    with pytest.raises(UserError, match="truncated"):
        Corpus(out)
    result = prepare(speech, out, workers=1, verify=True)
    assert result.num_shards_made == 3
    assert tree(out) == tree(speech.parent / "out")


def test_changed_manifest_and_audio_redo_what_differs(tmp_path):
    lines = make_lines(tmp_path, 20)
    manifest, out = write_lines(tmp_path / "m.jsonl", lines), tmp_path / "out"
    prepare(manifest, out, workers=1, shard_utterances=4)
    write_speech(tmp_path / "wav/1.wav", 99, seconds=0.3)
    lines[19]["text"] = "Different"
    assert prepare(write_lines(manifest, lines), out, workers=1).num_shards_made == 2
    assert Corpus(out).split("train").read(0).waveform.shape == (7200,)
    shorter = prepare(write_lines(manifest, lines[:12]), out, workers=1)
    assert shorter.num_utterances == 12
    fresh = tmp_path / "fresh"
    prepare(manifest, fresh, workers=1, shard_utterances=4)
    assert tree(out) == tree(fresh)
    with pytest.raises(UserError, match="begun with rate_hz=24000, not 16000"):
        prepare(manifest, out, rate_hz=16000)


def add_bad_utterances(root, lines):
    """Adds one utterance of every bad kind; returns what the report must say of each."""
    good = lines[0]
    write_speech(root / "wav/slow.wav", 1, rate_hz=6000)
    soundfile.write(root / "wav/empty.wav", np.zeros(0), 16000)
    soundfile.write(root / "wav/nan.wav", np.array([0.1, np.nan] * 2000, np.float32), 16000, subtype="FLOAT")
    (root / "wav/junk.wav").write_bytes(b"RIFFjunk" * 50)
    whole = (root / "wav/1.wav").read_bytes()
    (root / "wav/cut.wav").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(root / "a.tar", "w") as archive:
        archive.add(root / "wav/1.wav", "1.wav")
    bad = {
        "missing": ({"audio": "wav/none.wav"}, "wav/none.wav: no such"),
        "slow": ({"audio": "wav/slow.wav"}, "6000 Hz"),
        "empty": ({"audio": "wav/empty.wav"}, "no samples"),
        "nan": ({"audio": "wav/nan.wav"}, "NaN"),
        "junk": ({"audio": "wav/junk.wav"}, "cannot decode"),
        "cut": ({"audio": "wav/cut.wav"}, "copy the file again"),
        "member": ({"audio": "a.tar::2.wav"}, "no such member"),
        "vocabulary": ({"text": "Word ñ"}, "'ñ'"),
        "u1": ({}, 'duplicate id "u1"'),
    }
    lines.extend({**good, "id": name, **changes} for name, (changes, _) in bad.items())
    lines.append("{not json")
    lines.append({key: value for key, value in {**good, "id": "bare"}.items() if key != "language"})
    reasons = {name: reason for name, (_, reason) in bad.items()}
    return {**reasons, None: "not JSON", "bare": 'field "language" is missing'}


def test_bad_utterances_are_refused_and_the_rest_kept(tmp_path, capsys):
    lines = make_lines(tmp_path, 10)
    reasons = add_bad_utterances(tmp_path, lines)
    lines.append({**lines[0], "id": "tar", "audio": "a.tar::1.wav"})
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    (tmp_path / "v.json").write_text(json.dumps(list(" word0123456789")))
    command = ["prepare", str(manifest), str(tmp_path / "out"), f"--vocabulary={tmp_path / 'v.json'}", "--workers=1"]
    assert run(command) == 0
    assert f"11 utterances, 0.00 h; {len(reasons)} refused, 0 warnings" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {row["id"]: row for row in report["refused"]}
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name]["reason"]
        assert str(tmp_path) not in found[name]["reason"]
    assert found["missing"]["line"] == 11
    corpus = Corpus(tmp_path / "out")
    assert len(corpus.split("train")) + len(corpus.split("test")) == 11
    table = (tmp_path / "out/report.md").read_text()
    assert f"## Refused: {len(reasons)}" in table
    assert "| 11 | missing |" in table


def test_strict_stops_at_the_first_and_keeps_finished_shards(tmp_path, capsys):
    lines = make_lines(tmp_path, 10)
    lines[8]["audio"] = "wav/none.wav"
    manifest, out = write_lines(tmp_path / "m.jsonl", lines), tmp_path / "out"
    assert run(["prepare", str(manifest), str(out), "--strict", "--workers=1", "--shard_utterances=2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "m.jsonl:9: " in error
    assert "wav/none.wav: no such" in error
    assert len(list((out / "shards").glob("*.arrayrecord"))) >= 3
    shutil.copy(tmp_path / "wav/7.wav", tmp_path / "wav/none.wav")
    assert prepare(manifest, out, strict=True, workers=1).num_shards_kept >= 3
    write_lines(manifest, [*lines, "{"])
    with pytest.raises(UserError, match=r"m.jsonl:11: not JSON"):
        prepare(manifest, out, strict=True)


def test_a_split_that_lost_every_utterance_is_an_error(tmp_path):
    lines = make_lines(tmp_path, 4)
    lines[0]["audio"] = "wav/none.wav"
    manifest, out = write_lines(tmp_path / "m.jsonl", lines), tmp_path / "out"
    with pytest.raises(UserError, match=r'split "test" is empty: every utterance of it was refused; see .*report.md'):
        prepare(manifest, out, workers=1)
    assert "wav/none.wav" in (out / "report.md").read_text()
    assert not (out / "index.json").exists()


def test_channels_are_averaged_and_oddities_are_warnings(tmp_path):
    left, right = make_waveform(1, 8000), make_waveform(2, 8000)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], 1), 24000)
    soundfile.write(tmp_path / "loud.wav", np.clip(left * 5, -1, 1), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "long.wav", np.tile(left, 31), 8000)
    soundfile.write(tmp_path / "crowded.wav", left, 16000)  # half a second
    names = ("stereo.flac", "loud.wav", "silent.wav", "long.wav")
    fields = {"speaker": "s", "language": "en", "split": "train"}
    lines = [{"id": name, "audio": name, "text": "...", **fields} for name in names]
    lines.append({"id": "crowded.wav", "audio": "crowded.wav", "text": 51 * "a", **fields})
    result = prepare(write_lines(tmp_path / "m.jsonl", lines), tmp_path / "out", encoding="pcm16", workers=1)
    assert (result.num_utterances, result.num_refused) == (5, 0)
    stereo = Corpus(tmp_path / "out").split("train").read(0)
    np.testing.assert_allclose(stereo.waveform / 32768, (left + right) / 2, atol=4e-5)
    warnings = json.loads((tmp_path / "out/report.json").read_text())["warnings"]
    said = {(row["id"], row["warning"].split(":")[0]) for row in warnings}
    odd = {("loud.wav", "clipping"), ("silent.wav", "silence"), ("long.wav", "long")}
    assert said == odd | {(name, "text") for name in (*names, "crowded.wav")}
    assert warnings[-1]["warning"] == "text: 51 characters in 0.5 s are more than anybody speaks"


def test_mistakes_are_named(speech, tmp_path):
    for options, reason in (
        ({"rate_hz": 4000}, "rate_hz=4000"),
        ({"encoding": "mp3"}, "encoding=mp3"),
        ({"workers": -1}, "workers=-1"),
        ({"shard_utterances": -1}, "shard_utterances=-1"),
        ({"vocabulary": tmp_path / "none.json"}, "cannot read it"),
        ({"vocabulary": speech}, "not JSON"),
    ):
        with pytest.raises(UserError, match=reason):
            prepare(speech, tmp_path / "out", **options)
    with pytest.raises(UserError, match=r"is a file"):
        prepare(speech, speech)
    with pytest.raises(UserError, match=r"holds other files"):
        prepare(speech, speech.parent)
    assert run(["prepare", "one"]) == 2


def test_the_vocabulary_of_a_run_is_one(tmp_path):
    lines = make_lines(tmp_path, 8)
    characters = sorted(set("".join(normalize_transcript(line["text"] or "") for line in lines)))
    (tmp_path / "run.json").write_text(json.dumps({"facts": {"vocabulary": characters}}))
    lines[3]["text"] += " ñ"
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    assert prepare(manifest, tmp_path / "out", vocabulary=tmp_path / "run.json", workers=1).num_refused == 1
    (tmp_path / "run.json").write_text(json.dumps({"facts": {}}))
    with pytest.raises(UserError, match=r"run.json: expected a JSON list"):
        prepare(manifest, tmp_path / "out", vocabulary=tmp_path / "run.json")


def test_two_runs_do_not_share_a_directory(speech, tmp_path):
    import fcntl

    (tmp_path / "out/.prepare").mkdir(parents=True)
    with open(tmp_path / "out/.prepare/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `cv2jax prepare` is at work"):
            prepare(speech, tmp_path / "out")


def test_a_full_disk_is_one_clear_line(speech, tmp_path):
    command = f"ulimit -f 100; exec {sys.executable} -m cv2jax.cli.main prepare {speech} {tmp_path / 'out'} --workers=1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert not list((tmp_path / "out").glob("shards/*"))


def die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_clear_line(speech, tmp_path, monkeypatch):
    monkeypatch.setattr("cv2jax.jobs.prepare.build_shard", die)
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare(speech, tmp_path / "out", workers=2)


def test_workers_import_no_jax():
    code = "import sys, cv2jax.data.shard_builder; print([m for m in ('jax', 'scipy', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"rate_hz": 24000}', b"\xff"])
def test_damaged_options_are_named_with_the_mend(tmp_path, text):
    manifest = write_lines(tmp_path / "m.jsonl", make_lines(tmp_path, 2))
    options = tmp_path / "out/.prepare/options.json"
    options.parent.mkdir(parents=True)
    options.write_bytes(text)
    with pytest.raises(UserError, match=r"options\.json: is damaged.*remove that file and give the same command"):
        prepare(manifest, tmp_path / "out", workers=1)
