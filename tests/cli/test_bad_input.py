"""A user's mistake at the command line: one clear line, exit code 2, no traceback, nothing lost."""

import json

import pytest

from cv2jax.cli.main import run
from tests.small_corpus import make_small_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_corpus(tmp_path_factory.mktemp("c") / "prepared", num_train=16, num_test=4)


def refused(capsys, *words):
    code = run([str(word) for word in words])
    err = capsys.readouterr().err
    assert code == 2, err
    (line,) = [x for x in err.splitlines() if x.startswith("cv2jax ")]
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "expected one CONFIG"),
        (["train", "speech_tokenizer_tiny"], "--workdir is missing"),
        (["train", "speech_tokeniser_tiny", "--workdir=w"], "did you mean 'speech_tokenizer_tiny'"),
        (["train", "nowhere.py", "--workdir=w"], "nowhere.py does not exist"),
        (["train", "speech_tokenizer_tiny", "--workdir=w"], "data.corpus is not set"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--set=model.widht=3"], "did you mean 'width'"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--set=model.width=big"], "expected int, got str"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--set=model.width=9"], "model.width=9"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--corpus=nowhere"], "nowhere is not a prepared corpus"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--coordinator=x:1"], "also give --num_processes"),
        (
            ["train", "speech_tokenizer_tiny", "--workdir=w", "--coordinator=x", "--num_processes=2", "--process_id=1"],
            "host:port",
        ),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--num_processes=2"], "need --coordinator"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--set=data.batch_seconds=1e400"], "data.batch_seconds=inf"),
        (["train", "speech_tokenizer_tiny", "--workdir=w", "--steps=3"], "--help"),
        (["quickstart", "extra"], "unexpected argument 'extra'"),
        (["quickstart", "--hours=0"], "--hours"),
        (["quickstart", "--hours=many"], "--help"),
        (["report"], "expected one RUN"),
        (["report", "nowhere"], "holds no run"),
        (["ablate", "learning_rate", "--corpus=c", "--workdir=w"], "expected 'quantizer'"),
        (["ablate", "quantizer", "--workdir=w"], "--corpus is missing"),
        (["ablate", "quantizer", "--corpus=c", "--workdir=w", "--seeds=one"], "--seeds one"),
        (["ablate", "quantizer", "--corpus=c", "--workdir=w", "--seeds=0,0"], "--seeds: 0 is given twice"),
        (["quickstart", "--out=w", "--set=data.corpus=c"], "quickstart makes its own corpus"),
    ],
)
def test_one_line_and_exit_code_two(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert not (tmp_path / "w").exists()


def test_a_mesh_that_does_not_divide_the_devices(corpus, capsys, tmp_path):
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'w'}", "--set=mesh.fsdp=3"]
    assert "does not divide the 8 devices" in refused(capsys, *words)


def test_a_batch_that_does_not_divide_the_mesh(corpus, capsys, tmp_path):
    sets = ["--set=data.batch_multiple=2", "--set=data.batch_seconds=2", "--set=data.num_buckets=1"]
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'w'}", *sets]
    assert "data.batch_multiple (language model: data.batch_rows) to a multiple of 8" in refused(capsys, *words)


def test_a_split_that_is_not_there_and_a_length_nothing_has(corpus, capsys, tmp_path):
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'w'}"]
    assert "dev" in refused(capsys, *words, "--set=data.train_split=dev")
    assert "utterance" in refused(capsys, *words, "--set=data.min_seconds=20")


def test_a_run_of_another_config_keeps_its_files(corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("cv2jax.train.checkpoint.Checkpoints.latest_step", 5)
    workdir = tmp_path / "w"
    workdir.mkdir()
    run_json = json.dumps({"config": {"seed": 5}, "facts": {}})
    (workdir / "run.json").write_text(run_json)
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={workdir}"]
    assert "another config" in refused(capsys, *words)
    assert (workdir / "run.json").read_text() == run_json


def test_a_number_of_mel_bands_that_no_feature_has(corpus, capsys, tmp_path):
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'w'}"]
    assert "model.num_mels=80: the features have 128 bands" in refused(capsys, *words, "--set=model.num_mels=80")
    assert not (tmp_path / "w").exists()


def test_checkpoints_that_are_a_file(corpus, capsys, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "checkpoints").write_text("")
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'w'}"]
    assert "is a file where the checkpoints go" in refused(capsys, *words)


def test_a_corpus_with_a_truncated_shard(capsys, tmp_path):
    damaged = make_small_corpus(tmp_path / "c", num_train=16, num_test=4)
    shard = next((damaged / "shards").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    words = ["train", "speech_tokenizer_tiny", f"--corpus={damaged}", f"--workdir={tmp_path / 'w'}"]
    assert shard.name in refused(capsys, *words)


def test_a_workdir_that_cannot_be_written(corpus, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["train", "speech_tokenizer_tiny", f"--corpus={corpus}", f"--workdir={tmp_path / 'file' / 'w'}"]
    line = refused(capsys, *words)
    assert line.startswith(f"cv2jax train: {tmp_path / 'file' / 'w'}")
    assert "Not a directory" in line


def test_a_manifest_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "metadata.csv").write_text("a|One.|One.\n")
    (tmp_path / "wavs" / "a.wav").write_bytes(b"RIFF")
    assert "metadata.csv: File exists" in refused(
        capsys, "manifest", "ljspeech", tmp_path, tmp_path / "metadata.csv" / "m.jsonl"
    )
    assert "is a directory" in refused(capsys, "manifest", "ljspeech", tmp_path, tmp_path)
