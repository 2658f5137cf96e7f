"""`cv2jax f0`: resumable, the same for any number of workers, and nothing in a corpus stops it."""

import fcntl
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cv2jax.audio.f0 import fundamental_frequency
from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.f0 import F0File
from cv2jax.data.shards import Corpus, Record
from cv2jax.jobs.f0 import compute_f0
from tests.data.speech_files import make_record

RATE_HZ = 24000
BAD = {
    "silent": np.zeros(9000, np.int16),
    "noise": np.random.default_rng(0).integers(-3000, 3000, 9000).astype(np.int16),
    "clipped": np.where(np.sin(np.arange(9000) * 0.04) > 0, 32767, -32768).astype(np.int16),
    "50ms": (3000 * np.sin(np.arange(1200) * 0.05)).astype(np.int16),
    "less than a frame": np.ones(479, np.int16),
}


def voice(number: int) -> Record:
    """0.3 to 0.6 s of a voice of 100 to 300 Hz."""
    random = np.random.default_rng(number)
    time_ = np.arange(random.integers(7200, 14400)) / RATE_HZ
    hz = 100 + 20 * (number % 10)
    wave = sum(np.sin(2 * np.pi * k * hz * time_) / k for k in range(1, 7))
    record = make_record(number, 1)
    fields = {name: getattr(record, name) for name in ("id", "text", "speaker", "language")}
    return Record(**fields, rate_hz=RATE_HZ, waveform=(3000 * wave).astype(np.int16))


def bad(number: int, waveform: np.ndarray) -> Record:
    fields = {"text": None, "speaker": "s", "language": "en", "rate_hz": RATE_HZ}
    return Record(id=f"bad{number}", waveform=waveform, **fields)


def write(root: pathlib.Path, num_train: int = 12) -> pathlib.Path:
    strange = [bad(number, waveform) for number, waveform in enumerate(BAD.values())]
    train = [voice(number) for number in range(num_train)]
    write_corpus(root, {"train": train, "test": [voice(99), *strange]}, rate_hz=RATE_HZ, shard_utterances=4)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A corpus without F0."""
    return write(tmp_path_factory.mktemp("plain") / "corpus")


@pytest.fixture(scope="module")
def done(plain: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same with F0, made by one worker."""
    root = tmp_path_factory.mktemp("done") / "corpus"
    shutil.copytree(plain, root)
    compute_f0(root, workers=1)
    return root


@pytest.fixture
def corpus(done: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to spoil."""
    return pathlib.Path(shutil.copytree(done, tmp_path / "corpus"))


def tree(corpus: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in (corpus / "f0").rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(corpus)): path.read_bytes() for path in files}


def test_every_utterance_has_its_f0(done: pathlib.Path) -> None:
    opened = Corpus(done)
    for name in opened.splits:
        split, file = opened.split(name), F0File(done, name)
        assert len(file) == len(split)
        for row, record in enumerate(split):
            expected = fundamental_frequency(record.waveform / 32768.0, RATE_HZ, 480)
            assert len(expected) == len(record.waveform) // 480
            np.testing.assert_array_equal(file.read(row), expected)
    track = F0File(done, "train").read(3)
    assert np.median(track[track > 0]) == pytest.approx(160, abs=1)


def test_strange_utterances_are_zeros_and_are_counted(
    plain: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pathlib.Path(shutil.copytree(plain, tmp_path / "corpus"))
    assert run(["f0", str(root), "--workers=1", "--method=dio"]) == 0
    out = capsys.readouterr().out
    file = F0File(root, "test")
    assert file.method == "dio"
    unvoiced = [row for row in range(len(file)) if not file.read(row).any()]
    assert f"18 utterances, {sum(map(len, map(file.read, range(6)))) + num_frames(root, 'train')} frames" in out
    assert f"; {len(unvoiced)} utterances without a voiced frame" in out
    assert {1, 2, 4, 5} <= set(unvoiced)  # all but the voice and, as it may be, the clipped tone
    assert "x a core's time" in out


def num_frames(root: pathlib.Path, split: str) -> int:
    return int((Corpus(root).split(split).num_samples // 480).sum())


def test_workers_change_no_byte(plain: pathlib.Path, done: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(shutil.copytree(plain, tmp_path / "corpus"))
    result = compute_f0(root, workers=3)
    assert (result.workers, result.num_shards_made, result.changed) == (3, 5, True)
    assert result.cpu_seconds > 0
    assert tree(root) == tree(done)


def test_a_second_run_does_nothing_and_says_so(corpus: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (corpus / "f0").glob("*")}
    assert run(["f0", str(corpus), "--workers=1"]) == 0
    assert "f0 is up to date: nothing to do (18 utterances" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_it_goes_on_where_it_stopped(plain: pathlib.Path, done: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(shutil.copytree(plain, tmp_path / "corpus"))
    command = [sys.executable, "-m", "cv2jax.cli.main", "f0", str(root), "--workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(root.glob("f0/.notes/*-0*.json"))) < 2:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match=r"has no F0 yet .*; run `cv2jax f0 "):
        F0File(root, "train")
    time.sleep(0.2)  # its worker ends by itself
    result = compute_f0(root, workers=1)
    assert result.num_shards_kept >= 2
    assert result.num_shards_kept + result.num_shards_made == 5
    assert tree(root) == tree(done)


def test_what_is_damaged_is_made_again(corpus: pathlib.Path, done: pathlib.Path) -> None:
    cut, changed = corpus / "f0/train-00000.values", corpus / "f0/train-00001.values"
    cut.write_bytes(cut.read_bytes()[:100])
    changed.write_bytes(bytes(changed.stat().st_size))
    (corpus / "f0/.notes/train-00002.json").write_text('{"version": ')
    (corpus / "f0/.test-00000.values.7.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"train-00000\.values: has 100 of \d+ bytes; run `cv2jax f0 "):
        F0File(corpus, "train")
    assert compute_f0(corpus, workers=1).num_shards_made == 2
    assert tree(corpus) != tree(done)
    assert compute_f0(corpus, workers=1, verify=True).num_shards_made == 1
    assert tree(corpus) == tree(done)


def test_a_changed_corpus_keeps_what_is_the_same(corpus: pathlib.Path) -> None:
    shutil.rmtree(corpus / "shards")
    write(corpus, num_train=10)
    with pytest.raises(UserError, match=r"is of corpus \w+, this one is \w+; run `cv2jax f0 "):
        F0File(corpus, "test")
    assert compute_f0(corpus, workers=1).num_shards_kept == 4  # all but the shard that lost two
    assert len(F0File(corpus, "train")) == 10
    shutil.rmtree(corpus / "shards")
    write(corpus, num_train=8)
    assert compute_f0(corpus, workers=1).changed
    assert not list((corpus / "f0").rglob("train-00002*"))


def test_a_reader_travels_and_takes_rows(done: pathlib.Path) -> None:
    file = F0File(Corpus(done), "train")
    copied = pickle.loads(pickle.dumps(file)).take(np.array([7, 0, 11]))
    assert len(copied) == 3
    for row, source in enumerate((7, 0, 11)):
        np.testing.assert_array_equal(copied.read(row), file.read(source))
    np.testing.assert_array_equal(copied.take(np.array([2])).read(0), file.read(11))
    assert copied.hash == file.hash != F0File(done, "train").path
    for row in (-1, 3):
        with pytest.raises(IndexError):
            copied.read(row)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "corpus": "", "hop_length": 1}'])
def test_a_damaged_index_is_one_line(corpus: pathlib.Path, text: str) -> None:
    (corpus / "f0/index.json").write_text(text)
    with pytest.raises(UserError, match=r"f0/index\.json: is damaged \(.*run `cv2jax f0 "):
        F0File(corpus, "train")


def test_f0_of_another_hop_is_refused(corpus: pathlib.Path) -> None:
    index = json.loads((corpus / "f0/index.json").read_text()) | {"hop_length": 240}
    (corpus / "f0/index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"format 1, hop 240; this is 1, 480; remove .*f0 and run `cv2jax f0 "):
        F0File(corpus, "train")


def test_mistakes_are_one_line(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="choose harvest or dio"):
        compute_f0(corpus, method="yin")
    with pytest.raises(UserError, match="workers=-1"):
        compute_f0(corpus, workers=-1)
    with pytest.raises(UserError, match=r"begun with method=harvest, not dio; give that, or remove .*/f0"):
        compute_f0(corpus, method="dio")
    with pytest.raises(UserError, match="is not a prepared corpus"):
        compute_f0(tmp_path / "none")
    assert run(["f0"]) == 2
    record = make_record(0)
    fields = {name: getattr(record, name) for name in ("id", "text", "speaker", "language", "waveform")}
    write_corpus(tmp_path / "slow", {"train": [Record(**fields, rate_hz=16000)]}, rate_hz=16000)
    with pytest.raises(UserError, match=r"has 16000 Hz, but mel and F0 are of 24000 Hz; prepare a corpus with"):
        compute_f0(tmp_path / "slow")
    with open(corpus / "f0/.notes/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `cv2jax f0` is at work"):
            compute_f0(corpus, workers=1)


def die(task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(
    plain: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pathlib.Path(shutil.copytree(plain, tmp_path / "corpus"))
    monkeypatch.setattr("cv2jax.jobs.f0.build_f0", die)
    with pytest.raises(UserError, match="a worker process was killed"):
        compute_f0(root, workers=1)


def test_workers_import_no_jax() -> None:
    code = "import sys, cv2jax.data.f0_shard; print([m for m in ('jax', 'scipy', 'flax') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert found.stdout.strip() == "[]"
