"""The embedded corpus: deterministic, resumable, without leaks, and plain about bad arguments."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cv2jax.config import UserError
from cv2jax.jobs import corpus, espeak
from cv2jax.jobs.corpus import CorpusConfig, make_corpus, plan_utterances
from cv2jax.jobs.corpus_speakers import UNDERSTOOD_VARIANTS, list_speakers
from cv2jax.text.characters import normalize_transcript
from cv2jax.text.sentences import format_jsgf, is_grammar_sentence

SMALL = CorpusConfig(hours=0.0045, num_voices=5, held_out_share=0.1)
LANGUAGES = ("en", "cmn", "ja", "ko")


def read_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read_manifest(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small") / "corpus"
    make_corpus(root, SMALL, num_workers=1, show_progress=False)
    return root


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, corpus.CorpusSummary]:
    root = tmp_path_factory.mktemp("spoken") / "corpus"
    config = CorpusConfig(hours=0.03, languages=LANGUAGES, num_voices=6)
    return root, make_corpus(root, config, num_workers=1, show_progress=False)


def test_speech_does_not_depend_on_what_was_spoken_before() -> None:
    # Breath noise (f2, f5), flutter and gain control (m7, klatt4) are what espeak-ng carries over by itself.
    voices = [espeak.VoiceSettings(name=f"en-us+{variant}") for variant in ("f2", "f5", "m7", "klatt4")]
    forwards = [espeak.speak("bring the box", voice) for voice in voices]
    espeak.speak("我今天在家里看书", espeak.VoiceSettings(name="cmn+f3", rate=200, pitch=80))
    backwards = [espeak.speak("bring the box", voice) for voice in reversed(voices)][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({waveform.tobytes() for waveform in forwards}) == len(voices)


def test_settings_change_the_speech() -> None:
    name = "en-us+f3"
    plain = espeak.speak("move the lamp", espeak.VoiceSettings(name=name))
    slow = espeak.speak("move the lamp", espeak.VoiceSettings(name=name, rate=100))
    high = espeak.speak("move the lamp", espeak.VoiceSettings(name=name, pitch=80))
    flat = espeak.speak("move the lamp", espeak.VoiceSettings(name=name, pitch_range=10))
    assert len(slow) > 1.1 * len(plain)
    assert len({waveform.tobytes() for waveform in (plain, slow, high, flat)}) == 4


def test_unknown_voice_is_an_error() -> None:
    with pytest.raises(ValueError, match="no voice 'nowhere'"):
        espeak.speak("move the lamp", espeak.VoiceSettings(name="nowhere"))


def test_missing_espeak_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'cv2jax\[corpus\]'"):
        make_corpus(tmp_path / "corpus", SMALL, num_workers=1)
    assert not (tmp_path / "corpus").exists()


def test_same_arguments_give_the_same_bytes_for_any_number_of_workers(small: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "two", SMALL, num_workers=2, show_progress=False)
    assert read_bytes(tmp_path / "two") == read_bytes(small)


def test_another_seed_gives_another_corpus(small: Path, tmp_path: Path) -> None:
    config = CorpusConfig(hours=0.0045, num_voices=5, held_out_share=0.1, seed=1)
    make_corpus(tmp_path / "other", config, num_workers=1, show_progress=False)
    assert (tmp_path / "other" / "manifest.jsonl").read_bytes() != (small / "manifest.jsonl").read_bytes()


def test_manifest_and_audio(spoken: tuple[Path, corpus.CorpusSummary]) -> None:
    root, summary = spoken
    rows = read_manifest(root)
    assert len({row["id"] for row in rows}) == len(rows) == summary.num_utterances
    assert {row["language"] for row in rows} == set(LANGUAGES)
    assert summary.seconds == pytest.approx(0.03 * 3600, rel=0.2)  # a dozen seconds for each language and split
    assert summary.seconds == pytest.approx(sum(row["seconds"] for row in rows), abs=0.05)
    assert {row["audio"] for row in rows} == {f"audio/{path.name}" for path in (root / "audio").iterdir()}
    for row in rows:
        waveform, rate_hz = soundfile.read(root / row["audio"], dtype="int16")
        assert (rate_hz, waveform.ndim) == (espeak.RATE_HZ, 1)
        assert 1.0 < len(waveform) / rate_hz < 6.0
        assert len(waveform) / rate_hz == pytest.approx(row["seconds"], abs=1e-4)
        peak = np.abs(waveform.astype(np.int32)).max()
        assert 3000 < peak < 32767, f"{row['id']}: silent or clipped"
        assert len(row["text"]) / row["seconds"] < 20
        assert set(row) == {"id", "audio", "text", "speaker", "language", "split", "kind", "seconds"}


def test_all_voices_are_heard_in_training_and_nothing_leaks(spoken: tuple[Path, corpus.CorpusSummary]) -> None:
    rows = read_manifest(spoken[0])
    for language in LANGUAGES:
        heard = {row["speaker"] for row in rows if row["language"] == language and row["split"] == "train"}
        assert heard == {speaker.name for speaker in list_speakers(language, 6, 0)}
        assert len(heard) == 6
        assert any(row["language"] == language and row["split"] == "test" for row in rows)
    train, test = (
        {normalize_transcript(row["text"]).replace(" ", "") for row in rows if row["split"] == split}
        for split in ("train", "test")
    )
    assert not train & test


def test_grammar_is_written_beside_and_marks_its_sentences(spoken: tuple[Path, corpus.CorpusSummary]) -> None:
    root, summary = spoken
    assert (root / "grammar.jsgf").read_text() == format_jsgf()
    rows = [row for row in read_manifest(root) if row["language"] == "en"]
    assert all(is_grammar_sentence(row["text"]) == (row["kind"] == "grammar") for row in rows)
    assert "en/free" in summary.format()
    assert "en-caleb" in summary.format()


def test_plan_shares_kinds_and_repeats_only_when_sentences_run_out() -> None:
    config = CorpusConfig(hours=1.0, num_voices=7, kinds=(("grammar", 7.0), ("free", 3.0)))
    plan = plan_utterances(config, "en", "train")
    first = [next(plan) for _ in range(1000)]
    assert sum(utterance.kind == "grammar" for utterance in first) == 700
    assert len({utterance.text for utterance in first}) == 1000
    for start in range(0, 994, 7):
        assert len({utterance.speaker.name for utterance in first[start : start + 7]}) == 7
    held_out = plan_utterances(CorpusConfig(hours=1.0, languages=("cmn",), num_voices=5), "cmn", "test")
    texts = [next(held_out).text for _ in range(1000)]
    num_sentences = len(set(texts))
    assert 100 < num_sentences < 1000
    assert len(set(texts[:num_sentences])) == num_sentences


def test_repeats_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cv2jax.jobs.corpus_plan.list_split", lambda *_: ("take the red ball across the street",))
    summary = make_corpus(tmp_path / "corpus", SMALL, num_workers=1, show_progress=False)
    assert summary.num_repeated["en/train"] > 0
    assert "repeat one of them" in summary.format()


def test_finished_corpus_is_kept_and_mended(small: Path, tmp_path: Path) -> None:
    before = read_bytes(small)
    times = {path: path.stat().st_mtime_ns for path in (small / "audio").iterdir()}
    mine = small / "audio" / "notes.txt"
    mine.write_text("not ours to delete")
    assert make_corpus(small, SMALL, num_workers=1, show_progress=False).was_complete
    assert mine.read_text() == "not ours to delete"
    mine.unlink()
    assert read_bytes(small) == before
    assert {path: path.stat().st_mtime_ns for path in (small / "audio").iterdir()} == times
    files = sorted((small / "audio").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"")  # what a full disk leaves
    make_corpus(small, SMALL, num_workers=1, show_progress=False)
    assert read_bytes(small) == before


KILLED = CorpusConfig(hours=0.05, num_voices=5)
SCRIPT = """
import sys
from cv2jax.jobs.corpus import CorpusConfig, make_corpus
if __name__ == "__main__":
    make_corpus(sys.argv[1], CorpusConfig(hours=0.05, num_voices=5), num_workers=2, show_progress=False)
    assert "jax" not in sys.modules
"""


def test_killed_run_goes_on_and_leaves_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "speak.py"
    script.write_text(SCRIPT)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, str(script), str(killed)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("audio/*.flac"))) < 5:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    # The workers hold the other end of this pipe: it can be read to its end only when the last of them is gone.
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "manifest.jsonl").exists()
    (killed / "audio" / "en-train-000011.flac.77.tmp").write_bytes(b"half a file")
    subprocess.run([sys.executable, str(script), str(killed)], check=True)
    make_corpus(whole, KILLED, num_workers=1, show_progress=False)
    assert read_bytes(killed) == read_bytes(whole)


def test_broken_write_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "write", fail)
        with pytest.raises(UserError, match=r"is not finished .*No space left on device.*same command again"):
            make_corpus(tmp_path / "corpus", SMALL, num_workers=1, show_progress=False)
    assert make_corpus(tmp_path / "corpus", SMALL, num_workers=1, show_progress=False).num_utterances > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hours": 0.0}, "--hours 0.0: give a number of hours above 0"),
        ({"hours": float("nan")}, "--hours nan"),
        ({"languages": ("en", "xx")}, "--languages 'xx': choose from en,cmn,ja,ko"),
        ({"languages": ("en", "en")}, "--languages 'en,en'"),
        ({"languages": ()}, "--languages ''"),
        ({"num_voices": -1}, "--voices -1: give 1 to .* for en"),
        ({"num_voices": 0, "languages": ("ja",)}, "--voices 0: give 1 to"),
        ({"num_voices": 100_000}, "--voices 100000"),
        ({"hours": 0.001}, "cannot hold 5 voices; give at least 0.0037 hours"),
        ({"held_out_share": 0.0}, "--held_out_share 0.0"),
        ({"held_out_share": 0.9}, "--held_out_share 0.9"),
        ({"held_out_share": 1e-9}, "holds out no grammar sentence of en"),
        ({"kinds": (("songs", 1.0),)}, "--kinds songs:1: choose from grammar,free"),
        ({"kinds": (("free", 0.0),)}, "--kinds free:0"),
        ({"kinds": (("free", 1.0), ("free", 2.0))}, "name each kind once"),
        ({"kinds": (("grammar", 1.0),), "languages": ("ko",)}, "ko has only free sentences"),
    ],
)
def test_bad_configuration_is_one_clear_line(changes: dict, message: str, tmp_path: Path) -> None:
    config = CorpusConfig(**({"hours": 0.0045, "num_voices": 5} | changes))
    with pytest.raises(UserError, match=message) as caught:
        make_corpus(tmp_path / "corpus", config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_minimum_hours_that_the_error_names_are_enough() -> None:
    least = CorpusConfig(hours=1.0, languages=LANGUAGES, num_voices=9).minimum_hours()
    CorpusConfig(hours=least, languages=LANGUAGES, num_voices=9).validate()
    with pytest.raises(UserError, match="or fewer voices"):
        CorpusConfig(hours=0.9 * least, languages=LANGUAGES, num_voices=9).validate()


def test_occupied_directory_is_refused_and_left_alone(small: Path, tmp_path: Path) -> None:
    before = read_bytes(small)
    with pytest.raises(UserError, match=r"another configuration \(seed 0 there, 3 asked\)"):
        make_corpus(small, CorpusConfig(hours=0.0045, num_voices=5, held_out_share=0.1, seed=3), num_workers=1)
    assert read_bytes(small) == before
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"is not empty and holds no corpus\.json"):
        make_corpus(tmp_path, SMALL, num_workers=1)
    with pytest.raises(UserError, match="cannot make a corpus in"):
        make_corpus(tmp_path / "mine.txt" / "below", SMALL, num_workers=1)
    with pytest.raises(UserError, match="cannot make a corpus in"):
        make_corpus(tmp_path / "mine.txt", SMALL, num_workers=1)
    with pytest.raises(UserError, match="--workers -1"):
        make_corpus(tmp_path / "new", SMALL, num_workers=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_speakers_begin_with_those_a_recogniser_understands() -> None:
    speakers = list_speakers("en", 120, 0)
    assert [speaker.settings.name for speaker in speakers[:5]] == [f"en-us+{name}" for name in UNDERSTOOD_VARIANTS]
    assert {"f2", "f3", "f5", "m2", "caleb"} == set(UNDERSTOOD_VARIANTS)
    assert len({speaker.name for speaker in speakers}) == 120
    assert len({speaker.settings for speaker in speakers}) == 120
    assert all(120 <= speaker.settings.rate <= 160 for speaker in speakers)


@pytest.mark.parametrize("language", LANGUAGES)
def test_voices_have_distinct_waveforms(language: str) -> None:
    text = {
        "en": "take the red box",
        "cmn": "我每天在家里喝茶",
        "ja": "わたしは うちで ほんを よみます",
        "ko": "우리는 차를 마셔요",
    }
    waveforms = {espeak.speak(text[language], s.settings).tobytes() for s in list_speakers(language, 45, 0)}
    assert len(waveforms) == 45
