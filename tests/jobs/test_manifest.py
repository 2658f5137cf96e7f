import json

import pytest

from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.data.manifest import read_manifest
from cv2jax.jobs.manifest import make_manifest
from tests.data.speech_files import write_speech


def make_ljspeech(root, rows):
    (root / "wavs").mkdir(parents=True)
    (root / "metadata.csv").write_text("".join(f"{row}|Text.|Text.\n" for row in rows))
    for row in rows:
        write_speech(root / f"wavs/{row}.wav", 1)


def test_audio_is_relative_below_the_manifest_and_absolute_elsewhere(tmp_path, monkeypatch):
    make_ljspeech(tmp_path / "lj", ["a", "b"])
    monkeypatch.chdir(tmp_path)
    summary = make_manifest("ljspeech", "lj", "m.jsonl", held_out=0.0)
    assert (summary.splits, summary.num_without_text) == ({"train": 2}, 0)
    assert [utterance.audio for utterance in read_manifest("m.jsonl")] == ["lj/wavs/a.wav", "lj/wavs/b.wav"]
    make_manifest("ljspeech", "lj", "other/m.jsonl")
    assert next(read_manifest("other/m.jsonl")).audio == str(tmp_path / "lj/wavs/a.wav")


def test_mistakes_are_named_and_leave_no_manifest(tmp_path):
    make_ljspeech(tmp_path / "lj", ["a"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metadata.csv").write_text("")
    for arguments, reason in (
        (("flac", tmp_path / "lj"), "choose one of libritts"),
        (("ljspeech", tmp_path / "none"), "no such directory"),
        (("ljspeech", tmp_path / "empty"), "no utterance found"),
    ):
        with pytest.raises(UserError, match=reason):
            make_manifest(*arguments, tmp_path / "m.jsonl")
        assert not (tmp_path / "m.jsonl").exists()
    with pytest.raises(UserError, match="held_out"):
        make_manifest("ljspeech", tmp_path / "lj", tmp_path / "m.jsonl", held_out=1.0)


def test_the_verb_prints_counts_and_one_line_for_a_mistake(tmp_path, capsys):
    make_ljspeech(tmp_path / "lj", ["a", "b", "c"])
    out = tmp_path / "m.jsonl"
    assert run(["manifest", "ljspeech", str(tmp_path / "lj"), str(out), "--held_out=0", "--language=xx"]) == 0
    assert "train 3 utterances; 0 without text" in capsys.readouterr().out
    assert json.loads(out.read_text().splitlines()[0])["language"] == "xx"
    assert run(["manifest", "ljspeech"]) == 2
    assert "expected FORMAT, DIR and OUT" in capsys.readouterr().err
    make_ljspeech(tmp_path / "twice", ["a"])
    (tmp_path / "twice/metadata.csv").write_text("a|x|x\na|x|x\n")
    assert run(["manifest", "ljspeech", str(tmp_path / "twice"), str(out)]) == 2
    assert 'm.jsonl:2: duplicate id "a"' in capsys.readouterr().err
