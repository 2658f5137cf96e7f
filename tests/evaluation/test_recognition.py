"""The held-out metrics from arrays made by hand."""

import numpy as np
import pytest

from cv2jax.evaluation.recognition import RecognitionScore
from cv2jax.text.characters import UNKNOWN_ID, CharacterVocabulary

VOCABULARY = CharacterVocabulary.from_counts("")


def ids(texts, size=8):
    rows = [VOCABULARY.encode(t) for t in texts]
    return np.stack([np.pad(r, (0, size - len(r))) for r in rows]), np.array([len(r) for r in rows])


def batch(references, heard, ctc=None, row_mask=None):
    made = {"row_mask": np.ones(len(heard), bool) if row_mask is None else np.array(row_mask)}
    for name, texts in (("reference", references), ("text", heard), ("ctc", ctc)):
        if texts is not None:
            made[f"{name}_tokens"], made[f"num_{name}_tokens"] = ids(texts)
    made["speech_tokens"] = np.arange(len(heard) * 3).reshape(-1, 3) % 7
    made["num_speech_tokens"] = np.full(len(heard), 2)
    return made


def test_rates_codes_and_examples_of_two_batches():
    score = RecognitionScore(VOCABULARY, 6561, 3)
    score.add(batch(["one", "two"], ["one", "tow"], ["one", "two"]))
    score.add(batch(["ten", "six"], ["ten", "garbage"[:7]], ["ten", "garbage"[:7]], row_mask=[True, False]))
    got = score.metrics()
    assert got["num_utterances"] == 3
    assert got["cer"] == pytest.approx(2 / 9)
    assert got["wer"] == pytest.approx(1 / 3)
    assert got["ctc_cer"] == 0
    assert got["ctc_word_accuracy"] == 1
    assert got["num_speech_tokens"] == 6
    assert got["codes_used"] == 4  # 0 1 | 3 4 | 0 1: the row that only fills the batch counts nothing
    assert got["examples"] == [["one", "one"], ["two", "tow"], ["ten", "ten"]]
    assert np.shape(got["digit_histogram"]) == (8, 3)


def test_without_ctc_and_codebook_their_figures_are_absent():
    score = RecognitionScore(VOCABULARY, 0, None)
    score.add(batch(["a"], ["a"]))
    assert set(score.metrics()) == {"cer", "wer", "word_accuracy", "num_utterances", "examples"}


def test_an_unknown_character_is_an_error_even_when_heard_as_unknown():
    made = batch(["9"], ["9"])
    assert made["text_tokens"][0, 0] == UNKNOWN_ID
    score = RecognitionScore(VOCABULARY, 0, None)
    score.add(made)
    assert score.metrics()["cer"] == 1


def test_examples_are_spread_over_all_utterances():
    score = RecognitionScore(VOCABULARY, 0, None)
    texts = [chr(97 + i) for i in range(24)]
    score.add(batch(texts, texts))
    shown = [x[0] for x in score.metrics()["examples"]]
    assert len(shown) == 8
    assert shown[0] == "a"
    assert shown[-1] > "t"
