"""Splitting against the official front end (golden: one token a UTF-8 byte), and where ours differs."""

import json
import pathlib

import pytest

from cv2jax.config import UserError
from cv2jax.text.normalize import normalize_text, resolve_language
from cv2jax.text.split import is_speechless, normalize_and_split, split_paragraph
from cv2jax.text.tags import TAGS

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "text_frontend.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
# Official defects that the golden holds: text → (why, ours).
DIFFERENCES = {
    "面积是5 m²，价格 3.5 元 - 很便宜（真的）【注】": (
        'Q22: "3.5" became "3。5", and " - " lost its blanks before the rule that makes it a comma',
        ["面积是5 m平方，价格3.5元，很便宜真的注。"],
    ),
}


def count_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:20])
def test_golden(case):
    text = case["text"]
    ours = normalize_and_split(text, count_bytes, normalizer="none")
    if text in DIFFERENCES:
        assert case["split_True"] != DIFFERENCES[text][1]
        assert ours == DIFFERENCES[text][1]
    else:
        assert ours == case["split_True"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:20])
def test_splitting_the_joined_pieces_again_changes_nothing(case):
    normalized = normalize_text(case["text"], normalizer="none")
    language = resolve_language(case["text"], None)
    pieces = split_paragraph(normalized, count_bytes, language=language)
    assert split_paragraph("".join(pieces), count_bytes, language=language) == pieces


def _cut(text: str, language: str, **options: object) -> list[str]:
    """Every clause a piece of its own."""
    return split_paragraph(text, count_bytes, language=language, token_max_n=0, token_min_n=0, merge_len=0, **options)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "", []),
        ("en", "a", ["a."]),
        ("en", "a. b? c! d; e: f, g", ["a.", " b?", " c!", " d;", " e:", " f, g."]),
        ("en", "a。b", ["a。b."]),
        (
            "zh",
            "一。二？三！四；五：六、七.八?九!十;末，尾",
            ["一。", "二？", "三！", "四；", "五：", "六、", "七.", "八?", "九!", "十;", "末，尾。"],
        ),
        ("zh", "时:分", ["时:分。"]),
        ("en", "Really?! Yes...", ["Really?", " Yes."]),  # as upstream: the first of several stays
        ("en", 'He said "yes." Then” no.” end', ['He said "yes."', " Then” no.”", " end."]),
        ("en", 'He said "yes."', ['He said "yes."']),
        ("en", 'Yes.."x', ['Yes."', "x."]),
        ("en", '."Hello', ['"Hello.']),  # upstream fails: Q22b
        ("en", "?", []),
        ("en", "at 10:30, 3.5 or 3. 5", ["at 10:30, 3.5 or 3.", " 5."]),
        ("zh", "价格3.5元.对", ["价格3.5元.", "对。"]),
        ("ja", "はい。いいえ、3.5です", ["はい。", "いいえ、", "3.5です"]),  # no full stop is added
        ("ja", "？！え？！あ", ["？！", "え？！", "あ"]),  # nor any mark dropped
        ("hi", "नमस्ते। हाँ", ["नमस्ते।", " हाँ"]),
        ("ja", "？！", ["？！"]),
    ],
)
def test_clauses(language, text, expected):
    assert _cut(text, language) == expected
    if language not in ("en", "zh"):
        assert "".join(expected) == text


def test_commas_cut_on_request():
    assert _cut("a, b，c", "en", comma_split=True) == ["a,", " b，", "c."]
    assert _cut("一，二,三", "zh", comma_split=True) == ["一，", "二,", "三。"]
    assert _cut("1,000 a, b,", "en", comma_split=True) == ["1,000 a,", " b,"]
    assert _cut("一，二", "zh") == ["一，二。"]


def test_lengths_are_characters_in_chinese_and_tokens_elsewhere():
    chinese, english = "长" * 39 + "。", "x" * 39 + "."
    assert split_paragraph(chinese * 2, _never, language="zh") == [chinese * 2]
    assert split_paragraph(chinese * 3, _never, language="zh") == [chinese * 2, chinese]
    assert split_paragraph(english * 3, len, language="en") == [english * 2, english]
    assert split_paragraph(english * 3, lambda text: len(text) // 2, language="en") == [english * 3]


def _never(text: str) -> int:
    raise AssertionError("Chinese is not counted in tokens")


def test_a_piece_closes_only_above_the_minimum_and_a_short_end_joins():
    def clauses(*lengths: int) -> str:
        return "".join("x" * (n - 1) + "." for n in lengths)

    def lengths(*wanted: int, **options: int) -> list[int]:
        return [len(piece) for piece in split_paragraph(clauses(*wanted), len, language="en", **options)]

    assert lengths(60, 50) == [110]  # 60 is not more than the minimum
    assert lengths(61, 19) == [80]
    assert lengths(61, 20) == [61, 20]
    assert lengths(62, 19) == [81]  # closed, then joined again: shorter than 20
    assert lengths(61, 61, 61) == [61, 61, 61]
    assert lengths(10, 10, 10, token_max_n=15, token_min_n=5, merge_len=0) == [10, 10, 10]


def test_a_clause_is_cut_only_beyond_the_bound():
    for number in (159, 160):
        assert split_paragraph("好" * (number - 1) + "。", _never, language="zh") == ["好" * (number - 1) + "。"]
    assert split_paragraph("好" * 200 + "。", _never, language="zh") == ["好" * 160, "好" * 40 + "。"]
    assert split_paragraph("ab " * 60 + "end.", len, language="en") == [("ab " * 53)[:-1], " ab" * 7 + " end."]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("one " * 5_000, "en"),
        ("好" * 20_000, "zh"),
        ("あ" * 20_000, None),
        ("a" * 20_000, "en"),
        ("[breath]" * 2_500, "en"),
        ("e\u0301" * 10_000, "en"),
        ("很<strong>重</strong>要" * 900, "zh"),
    ],
)
def test_text_without_clause_ends_is_cut_and_nothing_is_lost(text, language):
    pieces = split_paragraph(text, lambda part: -(-len(part) // 2), language=language)
    assert "".join(pieces).removesuffix("。").removesuffix(".") == text
    assert len(pieces) >= len(text) // 330
    assert max(map(len, pieces)) <= 2 * (160 + 20)
    for piece in pieces:
        assert piece[0] != "\u0301"
        assert piece.count("[") == piece.count("]")
        assert piece.count("<") == piece.count(">")
    if text.startswith("one"):
        assert {word for piece in pieces for word in piece.split()} == {"one", "."}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        (" \n", []),
        ("?!...", []),
        ("。，！", []),
        ("😀", []),
        ("❤️👩‍🚀", []),
        ("😀 hi", ["😀 hi."]),
        ("はい  3.5", ["はい 3.5"]),
        ("[laughter]", ["[laughter]."]),
        ("Speaker A<|endofprompt|>I have 3. " * 9, ["Speaker A<|endofprompt|>I have 3. " * 9]),
        ("今天 very good！Really? 对", ["今天very good！Really?对。"]),
    ],
)
def test_normalize_and_split(text, expected):
    assert normalize_and_split(text, count_bytes, normalizer="none") == expected


def test_the_language_is_that_of_the_text_given():
    assert normalize_and_split("drei 3", count_bytes, language="de") == ["drei 3"]
    assert normalize_and_split("3", count_bytes, language="zh", normalizer="none") == ["3。"]


@pytest.mark.parametrize("language", ["zh", "en", "ja"])
def test_no_tag_is_cut(language):
    for tag in TAGS:
        assert _cut(f"a{tag}b", language, comma_split=True)[0].startswith(f"a{tag}b")


@pytest.mark.parametrize(
    ("text", "expected"), [("", True), ("。 😀\n", True), ("\u0301", True), ("a", False), ("½", False), ("好", False)]
)
def test_is_speechless(text, expected):
    assert is_speechless(text) is expected


@pytest.mark.parametrize("options", [{"token_min_n": 81}, {"token_min_n": -1}, {"token_max_n": 10}, {"merge_len": -1}])
def test_lengths_out_of_order_are_refused(options):
    with pytest.raises(
        UserError, match=r"^splitting: expected 0 <= token_min_n <= token_max_n and 0 <= merge_len, got"
    ):
        split_paragraph("a", len, **options)


def test_the_errors_of_normalisation_come_through():
    with pytest.raises(UserError, match=r"^language: it is empty"):
        split_paragraph("a", len, language="")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        normalize_and_split("\ud83d", len)
    with pytest.raises(UserError, match="normalizer 'frd'"):
        normalize_and_split("a", len, normalizer="frd")
