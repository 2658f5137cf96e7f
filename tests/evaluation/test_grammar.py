"""pocketsphinx hears the sentences of the slot grammar, tells errors from hits, and nothing in noise."""

import pathlib
import sys

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.evaluation.grammar import GrammarRecogniser
from cv2jax.jobs import espeak
from cv2jax.jobs.corpus_speakers import list_speakers
from cv2jax.text.sentences import format_jsgf, list_split

SENTENCE = "take the white basket along the road"


@pytest.fixture(scope="module")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("grammar") / "grammar.jsgf"
    path.write_text(format_jsgf())
    return path


@pytest.fixture(scope="module")
def recogniser(grammar: pathlib.Path) -> GrammarRecogniser:
    return GrammarRecogniser(grammar)


def test_held_out_sentences_of_a_clear_voice_are_heard(recogniser: GrammarRecogniser) -> None:
    [voice] = [speaker for speaker in list_speakers("en", 16, 0) if speaker.name == "en-f3"]
    texts = list_split("en", "grammar", "test", 0.05)[:4]
    waveforms = [espeak.speak(text, voice.settings).astype(np.float64) / 32768.0 for text in texts]
    heard = [recogniser.read(waveform, espeak.RATE_HZ) for waveform in waveforms]
    found = recogniser.judge(texts, heard)
    assert (found.num_utterances, found.num_exact, found.num_words) == (4, 4, 28)
    assert found.word_error_rate == found.slot_word_error_rate == 0
    # Heard backwards it is no sentence.
    assert recogniser.judge(texts[:1], [recogniser.read(waveforms[0][::-1], espeak.RATE_HZ)]).word_error_rate > 0.5


@pytest.mark.parametrize("rate_hz", [16000, 24000])
@pytest.mark.parametrize(
    "waveform",
    [
        np.zeros(24000),
        np.zeros(0),
        np.full(1200, 0.1),
        np.full(9000, np.nan),
        0.1 * np.random.default_rng(0).standard_normal(24000),
    ],
    ids=["silence", "nothing", "50ms", "nan", "noise"],
)
def test_nothing_is_heard_where_nothing_is_said(
    recogniser: GrammarRecogniser, waveform: np.ndarray, rate_hz: int
) -> None:
    assert recogniser.read(waveform, rate_hz) == ""


def test_errors_are_counted_by_word(recogniser: GrammarRecogniser) -> None:
    heard = [SENTENCE, "take the green basket along the road", "take the basket on the road", "", f"well {SENTENCE}"]
    found = recogniser.judge([SENTENCE.capitalize() + "."] * 5, heard)
    assert (found.num_words, found.num_slot_words, found.num_exact) == (35, 25, 1)
    # white → green; white gone, along → on; all; one too many, which is no slot's.
    assert found.word_errors == 0 + 1 + 2 + 7 + 1
    assert found.slot_word_errors == 0 + 1 + 2 + 5 + 0
    assert found.chance_slot_word_error_rate == pytest.approx(7 / 8)
    assert found.metrics()["word_error_rate"] == pytest.approx(11 / 35)
    assert recogniser.judge([], []).word_error_rate == 0


def test_only_sentences_of_the_grammar_are_judged(recogniser: GrammarRecogniser) -> None:
    assert recogniser.covers("Take the WHITE basket, along the road!")
    for text in ("", "hello", SENTENCE + " now", "take the white basket"):
        assert not recogniser.covers(text)
    with pytest.raises(ValueError, match="'hello' is no sentence of the grammar"):
        recogniser.judge(["hello"], ["hello"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public <s> = <a>; <a> = x;",
        "#JSGF V1.0;\ngrammar g;\n<a> = x;",
        "#JSGF V1.0;\ngrammar g;\npublic <s> = take | bring;",
        "#JSGF V1.0;\ngrammar g;\npublic <s> = take;",
        "#JSGF V1.0;\ngrammar g;\npublic <s> = <b>;\n<a> = x;",
        "#JSGF V1.0;\ngrammar g;\npublic <s> = <b>;\n<a> = x;\n<b> = <a> | y;",
    ],
)
def test_other_grammars_are_refused(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "g.jsgf"
    path.write_text(text)
    with pytest.raises(UserError, match=r"g\.jsgf: not a JSGF grammar of one sentence with slots; give the grammar"):
        GrammarRecogniser(path)


def test_words_that_nobody_knows_are_one_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "g.jsgf"
    path.write_text("#JSGF V1.0;\ngrammar g;\npublic <s> = take <a>;\n<a> = xyzzyq | plughq;\n")
    with pytest.raises(UserError, match=r"g\.jsgf: pocketsphinx cannot use this grammar \("):
        GrammarRecogniser(path)


def test_missing_files_and_packages_are_one_line(
    tmp_path: pathlib.Path, grammar: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none\.jsgf: cannot read this grammar"):
        GrammarRecogniser(tmp_path / "none.jsgf")
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(UserError, match=r"needs pocketsphinx: pip install 'cv2jax\[judges\]'"):
        GrammarRecogniser(grammar)
