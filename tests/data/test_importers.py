import io
import json
import tarfile

import pytest

from cv2jax.config import UserError
from cv2jax.data.importers import IMPORTERS, ImportOptions
from tests.data.speech_files import write_speech


def run(name, root, **options):
    return {found.id: found for found in IMPORTERS[name](root, ImportOptions(**options))}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def describe(identity, **changes):
    values = {"id": identity, "wav": "x", "text": " Hi. ", "duration": 1.0, "speaker": "EN_S1", "language": "en"}
    return json.dumps({**values, **changes}).encode()


def test_libritts(tmp_path):
    for subset, name in (("train-clean-100", "19_198_1"), ("dev-other", "7_8_1"), ("test-clean", "5_6_1")):
        speaker, chapter, _ = name.split("_")
        write_speech(tmp_path / subset / speaker / chapter / f"{name}.wav", 1)
        if subset != "dev-other":
            write(tmp_path / subset / speaker / chapter / f"{name}.normalized.txt", f"Text {name}.\n")
    (tmp_path / "trash").mkdir()
    found = run("libritts", tmp_path)
    assert {name: utterance.split for name, utterance in found.items()} == {
        "19_198_1": "train",
        "7_8_1": "dev",
        "5_6_1": "test",
    }
    first = found["19_198_1"]
    assert (first.audio, first.text) == ("train-clean-100/19/198/19_198_1.wav", "Text 19_198_1.")
    assert (first.speaker, first.language, found["7_8_1"].text) == ("19", "en", None)
    with pytest.raises(UserError, match="is this LibriTTS"):
        run("libritts", tmp_path / "trash")


def test_ljspeech_holds_out_the_same_share_whatever_the_order(tmp_path):
    rows = [f"LJ{i:03}|Mr. {i}|Mister {i}" for i in range(200)] + ["LJ200|Only this.|"]
    write(tmp_path / "metadata.csv", "\n".join(rows) + "\n")
    found = run("ljspeech", tmp_path, held_out=0.2)
    held = {name for name, utterance in found.items() if utterance.split == "test"}
    assert 20 < len(held) < 60
    assert (found["LJ003"].text, found["LJ003"].audio) == ("Mister 3", "wavs/LJ003.wav")
    assert found["LJ200"].text == "Only this."
    write(tmp_path / "metadata.csv", "\n".join(rows[::-2]) + "\n")
    assert all(
        (utterance.split == "test") == (name in held)
        for name, utterance in run("ljspeech", tmp_path, held_out=0.2).items()
    )
    write(tmp_path / "metadata.csv", "LJ1|ok|ok\nnonsense\n")
    with pytest.raises(UserError, match=r"metadata.csv:2: expected id\|text"):
        run("ljspeech", tmp_path)
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"metadata.csv: cannot read it"):
        run("ljspeech", tmp_path)


def test_aishell3_drops_the_pinyin(tmp_path):
    write(tmp_path / "train/content.txt", "SSB00050001.wav\t广 guang3 州 zhou1\nSSB00090002.wav\t女 nv3\n")
    write(tmp_path / "test/content.txt", "SSB00120001.wav\t大 da4\n")
    found = run("aishell3", tmp_path)
    assert [utterance.text for utterance in found.values()] == ["广州", "女", "大"]
    first = found["SSB00050001"]
    assert (first.audio, first.speaker, first.language) == ("train/wav/SSB0005/SSB00050001.wav", "SSB0005", "zh")
    assert found["SSB00120001"].split == "test"
    write(tmp_path / "test/content.txt", "SSB00120001.wav\t大 da4 小\n")
    with pytest.raises(UserError, match=r"test/content.txt:1: "):
        run("aishell3", tmp_path)
    with pytest.raises(UserError, match="is this AISHELL-3"):
        run("aishell3", tmp_path / "train")


def test_emilia_names_members_of_archives(tmp_path):
    make_tar(
        tmp_path / "EN/EN-B0.tar", {"a/E1.json": describe("E1"), "a/E1.mp3": b"x", "E2.json": describe("E2", text=None)}
    )
    make_tar(tmp_path / "ZH/ZH-B0.tar", {"Z1.flac": b"y", "Z1.json": describe("Z1", language="zh")})
    found = run("emilia", tmp_path, held_out=0.0)
    assert [utterance.audio for utterance in found.values()] == [
        "EN/EN-B0.tar::a/E1.mp3",
        "EN/EN-B0.tar::E2.mp3",
        "ZH/ZH-B0.tar::Z1.flac",
    ]
    assert (found["E1"].text, found["E2"].text, found["Z1"].language, found["Z1"].split) == ("Hi.", None, "zh", "train")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"E1.json": b"{"}, r"bad.tar::E1.json: not a description"),
        ({"E1.json": b"[]"}, r"bad.tar::E1.json: not a description"),
        ({"E1.json": describe("E1", speaker=None)}, r"bad.tar::E1.json: .* non-empty"),
        ({"E1.mp3": b"x"}, r"bad.tar: E1.mp3 has no E1.json"),
    ],
)
def test_emilia_names_what_is_broken(tmp_path, members, reason):
    make_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=reason):
        run("emilia", tmp_path)


def test_emilia_needs_archives(tmp_path):
    with pytest.raises(UserError, match=r"no .tar archive"):
        run("emilia", tmp_path)
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(UserError, match=r"x.tar"):
        run("emilia", tmp_path)


def test_kaldi_directories_are_splits(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path / split / "wav.scp", f"{split}1 wav/a b.wav\n{split}2\t/abs/b.flac\n")
        write(tmp_path / split / "utt2spk", f"{split}1 anna\n{split}2 bert\n")
        write(tmp_path / split / "text", f"{split}1 HELLO  WORLD\n{split}2\n")
    write(tmp_path / "dev/utt2lang", "dev1 de\ndev2 en\n")
    found = run("kaldi", tmp_path / "dev")
    assert [(u.audio, u.text, u.speaker, u.language, u.split) for u in found.values()] == [
        ("wav/a b.wav", "HELLO  WORLD", "anna", "de", "dev"),
        ("/abs/b.flac", "", "bert", "en", "dev"),
    ]
    both = run("kaldi", tmp_path, language="en")
    assert {u.split for u in both.values()} == {"dev", "train"}
    assert both["train1"].audio == "train/wav/a b.wav"
    with pytest.raises(UserError, match="give --language"):
        run("kaldi", tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"wav.scp": "u1 sox a.wav -t wav - |\n", "utt2spk": "u1 s\n"}, r"wav.scp:1: .* is a command"),
        ({"wav.scp": "u1\n", "utt2spk": "u1 s\n"}, r"wav.scp:1: expected an id and a path"),
        ({"wav.scp": "u1 a.wav\n", "utt2spk": "u2 s\n"}, r"utt2spk: no speaker for utterance 'u1'"),
        ({"wav.scp": "u1 a.wav\n", "utt2spk": "u1\n"}, r"utt2spk:1: expected a key and a value"),
        ({"wav.scp": "u1 a.wav\n"}, r"utt2spk: cannot read it"),
        ({"wav.scp": "u1 a.wav\n", "utt2spk": "u1 s\n", "segments": "u1 r 0 1\n"}, r"segments: .*extract-segments"),
        ({"text": "u1 x\n"}, r"no wav.scp"),
    ],
)
def test_kaldi_names_what_is_broken(tmp_path, files, reason):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(UserError, match=reason):
        run("kaldi", tmp_path, language="en")
