"""Text normalisation against the official front end (golden, without external normaliser), and where ours differs."""

import json
import pathlib

import pytest

from cv2jax.config import UserError
from cv2jax.text.normalize import detect_language, is_left_alone, normalize_text, resolve_language
from cv2jax.text.tags import TAGS, split_tags

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "text_frontend.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
# Official defects that the golden holds: text → (why, ours).
DIFFERENCES = {
    "面积是5 m²，价格 3.5 元 - 很便宜（真的）【注】": (
        'Q22: "3.5" became "3。5", and " - " lost its blanks before the rule that makes it a comma',
        "面积是5 m平方，价格3.5元，很便宜真的注",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:20])
def test_golden(case):
    text = case["text"]
    ours = normalize_text(text, normalizer="none")
    if text in DIFFERENCES:
        assert case["split_False"] != DIFFERENCES[text][1]
        assert ours == DIFFERENCES[text][1]
    else:
        assert ours == case["split_False"]
    if "——" not in text:  # it becomes a blank, which a second pass strips
        assert normalize_text(ours, normalizer="none") == ours


def test_every_named_difference_is_a_golden_case():
    assert len(CASES) == 24
    assert set(DIFFERENCES) <= {case["text"] for case in CASES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "en"),
        ("?! 12 😀", "en"),
        ("Hello, 3 times", "en"),
        ("中", "zh"),
        ("mixed 中 with words", "zh"),
        ("约翰・史密斯", "zh"),  # the katakana middle dot is no Japanese
        ("東京に行く", "other"),
        ("カタカナ", "other"),
        ("안녕 中", "other"),
        ("Größe 3", "other"),
        ("Привет", "other"),
        ("𠀀", "other"),  # outside the block that upstream knows
    ],
)
def test_detect_language(text, expected):
    assert detect_language(text) == expected
    assert resolve_language(text, None) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [("zh", "zh"), ("cmn", "zh"), ("zh-CN", "zh"), ("en_GB", "en"), (" EN ", "en"), ("ja", "other"), ("eng", "other")],
)
def test_a_given_code_wins_over_the_letters(code, expected):
    assert resolve_language("中 or Latin", code) == expected


@pytest.mark.parametrize("code", ["", " "])
def test_an_empty_language_is_refused(code):
    with pytest.raises(UserError, match=r"^language: it is empty"):
        normalize_text("a", language=code)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("价格3.5。版本1.2.3.", "价格3.5。版本1.2.3。"),
        ("第1.节 e.g. 好", "第1。节e。g。好"),
        ("a - b 好 - 坏", "a，b好，坏"),
        ("好-坏 5-3", "好-坏5-3"),
        ("听 hello  big\nworld 吧", "听hello big world吧"),  # upstream: "hellobigworld"
        ("中\r\n文 \t字", "中文字"),
        ("面积 5 m² 和 3 m³", "面积5 m平方和3 m立方"),
        ("（甲）【乙】`丙`", "甲乙丙"),
        ("[方]括号", "[方]括号"),
        ("好,，、", "好。"),
        ("好😀3 个", "好😀3个"),
    ],
)
def test_chinese_rules(text, expected):
    assert normalize_text(text, normalizer="none") == expected
    assert normalize_text(expected, normalizer="none") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  2 cats ", "two cats"),
        ("?!", "?!"),
        ("😀 3", "😀 three"),
        ("3 m²", "three m²"),  # upstream: "mzero"
        ("3.14", "three.fourteen"),  # as upstream: decimals are the external normaliser's matter
        ("\n ", ""),
    ],
)
def test_english_rules(text, expected):
    assert normalize_text(text, normalizer="none") == expected
    assert normalize_text(expected, normalizer="none") == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (" 東京に  3 人。\n３.5 - 2 ", None, "東京に 3 人。 ３.5 - 2"),
        ("Größe  3", None, "Größe 3"),
        ("drei  3", "de", "drei 3"),
        ("中文 3.5 （好）", "yue", "中文 3.5 （好）"),
        ("café 3", "en", "café three"),
        ("مرحبا ٣", None, "مرحبا ٣"),
    ],
)
def test_an_unknown_language_is_left_alone(text, language, expected):
    assert normalize_text(text, language=language) == expected
    assert normalize_text(expected, language=language) == expected


@pytest.mark.parametrize("text", ["", "a <|x|>  12 中 3.", " |> 3 <| ", "Speaker 1<|endofprompt|>I have 3"])
def test_control_tokens_switch_normalisation_off(text):
    assert is_left_alone(text)
    assert normalize_text(text) == text


@pytest.mark.parametrize("frame", ["I{}have 3 {}.", "我{}有 3 {}个。", "{}", "{}  {}", "{}——{}（中）"])
def test_tags_stay_as_they_are(frame):
    for tag in TAGS:
        text = normalize_text(frame.replace("{}", tag), normalizer="none")
        assert [segment.text for segment in split_tags(text) if segment.is_tag] == [tag] * frame.count("{}")


def test_a_very_long_text():
    assert normalize_text("好 " * 100_000, normalizer="none") == "好" * 100_000
    assert normalize_text("1" * 10_000, normalizer="none") == " ".join(["one"] * 10_000)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(UserError, match=r"^text: character 2 is half of a surrogate pair$"):
        normalize_text("hi\ud83d")
