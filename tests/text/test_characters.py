"""Transcript normalisation and the character vocabulary."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.text.characters import EOS_ID, NUM_SPECIAL, SOS_ID, UNKNOWN_ID, CharacterVocabulary, normalize_transcript


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  World!", "hello world"),
        ("Don’t 'quote' rock'n'roll", "don't quote rock'n'roll"),
        ("forty-two", "forty two"),
        ("Ｆｕｌｌ width", "full width"),
        ("你好，世界。", "你好 世界"),
        ("カタカナ・です", "カタカナ です"),
        ("안녕하세요?", "안녕하세요"),
        ("Straße", "strasse"),
        ("naïve cafe\u0301", "naïve café"),
        ("£5 + 3%", "5 3"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize_transcript(text) == expected
    assert normalize_transcript(expected) == expected


def test_vocabulary_holds_basic_latin_and_what_it_saw():
    vocabulary = CharacterVocabulary.from_counts({"你": 3, "z": 1})
    assert set("abcxyz' 你") <= set(vocabulary.characters)
    assert vocabulary.size == NUM_SPECIAL + len(vocabulary.characters)
    assert list(vocabulary.characters) == sorted(vocabulary.characters)


def test_encode_decode():
    vocabulary = CharacterVocabulary.from_counts("")
    ids = vocabulary.encode("Hi, Bob!")
    assert ids.dtype == np.int32
    assert vocabulary.decode([SOS_ID, *ids, EOS_ID, *ids]) == "hi bob"
    assert vocabulary.encode(None).size == 0


def test_a_character_outside_is_unknown_and_named():
    vocabulary = CharacterVocabulary.from_counts("")
    assert vocabulary.missing("añ9b") == "9ñ"
    ids = vocabulary.encode("a9")
    assert ids[1] == UNKNOWN_ID
    assert vocabulary.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("values", ["ab", ["ab"], ["a", "a"], [1], {"a": 1}])
def test_from_json_refuses_what_is_not_a_list_of_characters(values):
    with pytest.raises(UserError, match=r"vocabulary v\.json"):
        CharacterVocabulary.from_json(values, "v.json")
    assert CharacterVocabulary.from_json(["b", "a"], "v.json").characters == ("b", "a")
