"""The incremental tokenizer: every chunking gives the ids of the whole text, and ids come as early as they can."""

import random
import unicodedata

import pytest

from cv2jax.text.incremental import _joins_previous, flush, init_incremental, push
from cv2jax.text.tokenizer import TextTokenizer, load_text_tokenizer, train_text_tokenizer

TEXTS = (
    "Well, the old mill isn't far; they'll say it's 305 steps. We've come, I'd say: 99.",
    "老磨坊不远，老磨坊很老。我们走三百步，我们很远。",
    "ふるい水車は、とおくない。ふるい水車です。",
    "오래된 방앗간은 멀지 않아요. 오래된 방앗간.",
    "a  b\n\n  c\r\n\t=== !!!\n\n --- e\u0301",
) * 2
# What the borders hinge on: contractions, marks that join or reorder, jamo, blanks and line breaks, halves of tokens.
NASTY = (
    *(
        "a",
        "mill",
        "the",
        "e",
        "S",
        "'",
        "'l",
        "l",
        "'S",
        "ſ",
        "'re",
        "1",
        "２",
        "30",
        "½",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
    ),
    *(
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x1c",
        "!",
        "!!",
        "?",
        "…",
        "-",
        "====",
        "=",
        "老",
        "磨坊",
        "，",
        "。",
        "々",
    ),
    *("豈", "\uf900", "𠮷", "\U0002f804", "〇", "ふるい", "か", "\u3099", "오래", "ᄒ", "ᅡ", "ᆫ", "한", "하"),
    *(
        "\u0301",
        "\u0323",
        "\u0338",
        "\u0344",
        "\u0f73",
        "Å",
        "\u212b",
        "क",
        "\u093c",
        "\u0958",
        "\u09c7",
        "\u09be",
        "กำ",
    ),
    *("👩\u200d👧", "🏽", "\ufe0f", "<", ">", "[", "]", "<|", "|>", "/", "[laughter]", "[la", "ughter]", "[mn]", "mn"),
    *("<|endofprompt|>", "<|endof", "prompt|>", "<strong>", "</", "strong>", "[[", "<<|"),
)


@pytest.fixture(scope="module", params=["single", "multi", "multi_split", "prefixes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Trained single and not; with Chinese words in the vocabulary but split; with one added token a prefix of others."""
    trained = train_text_tokenizer(TEXTS, 420, single_chinese=request.param == "single")
    if request.param in ("single", "multi"):
        return trained
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "prefixes":
        from tokenizers import AddedToken

        for token in ("<|", "<|e", "[la", "ab", "aab", "mill"):
            trained._backend.add_tokens([AddedToken(token, normalized=False)])
    trained.save(place)
    return load_text_tokenizer(place, single_chinese=request.param == "multi_split")


def stream(tokenizer: TextTokenizer, pieces: list[str]) -> list[list[int]]:
    """Ids that each piece released, and those of the flush."""
    state, released = init_incremental(), []
    for piece in pieces:
        state, ids = push(tokenizer, state, piece)
        released.append(ids)
    return [*released, flush(tokenizer, state)]


def cut(text: str, r: random.Random, longest: int) -> list[str]:
    """Random pieces of 0 … longest characters; none is empty if longest is 1."""
    pieces = []
    while text:
        size = r.randint(longest == 1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def test_any_chunking_gives_the_ids_of_the_whole(tokenizer):
    r = random.Random(11)
    for _ in range(350):
        text = "".join(r.choices(NASTY, k=r.randint(1, 14)))
        expected = tokenizer.encode(text)
        for longest in (1, r.randint(2, 6)):
            pieces = cut(text, r, longest)
            assert [i for ids in stream(tokenizer, pieces) for i in ids] == expected, pieces


def test_any_chunking_of_arbitrary_characters(tokenizer):
    """Over all of Unicode, marks and Hangul favoured."""
    r = random.Random(12)
    marks = [chr(i) for i in range(0x20000) if unicodedata.combining(chr(i))]
    jamo = [chr(i) for i in (*range(0x1100, 0x1200), *range(0xAC00, 0xAC40))]
    for _ in range(150):
        plain = [chr(i) for i in r.choices(range(1, 0xD800), k=6)] + [
            chr(i) for i in r.choices(range(0xE000, 0x32000), k=3)
        ]
        text = "".join(r.choices([*plain, *r.choices(marks, k=4), *r.choices(jamo, k=3), *"ae 1\n"], k=16))
        pieces = cut(text, r, 1)
        assert [i for ids in stream(tokenizer, pieces) for i in ids] == tokenizer.encode(text), ascii(text)


def released_after(tokenizer: TextTokenizer, text: str) -> str:
    """The text of the ids that are out after `text` came character by character."""
    ids = [i for ids in stream(tokenizer, list(text))[:-1] for i in ids]
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("text", "released"),
    [
        ("the mill", "the"),
        ("the ", "the"),
        ("the mill.", "the mill"),
        ("the mill. ", "the mill."),
        ("305", "30"),
        ("it's ", "it's"),
        ("they'll", "they"),  # "'ll" is sure only when the next character shows that the word "'ll…" is none
        ("they'll g", "they'll"),
        ("well\n\n  x", "well\n\n "),
        ("well!\n ", "well!\n"),
        ("well\n ", "well"),  # another line break would join the first
        ("e\u0301", ""),
        ("so e", "so"),
        ("a [laughter]", "a [laughter]"),
        ("a [laughte", "a"),
        ("a [laughte ", "a [laughte"),
        ("Slowly<|endofprompt|>", "Slowly<|endofprompt|>"),
        ("오래된 방", "오래된"),
    ],
)
def test_text_is_held_no_longer_than_needed(text, released):
    for single in (True, False):
        assert released_after(train_text_tokenizer(TEXTS, 420, single_chinese=single), text) == released


def test_single_chinese_characters_come_one_by_one():
    single = train_text_tokenizer(TEXTS, 420, single_chinese=True)
    text = "老磨坊不远，很好\uf900𠮷我a"
    for i in range(1, len(text)):
        assert released_after(single, text[: i + 1]) == unicodedata.normalize("NFC", text[:i])
    assert released_after(single, "老\u0301") == ""  # a border inside a base with its marks is never used
    assert released_after(single, "好ふるい") == "好"  # other letters are words as ever
    assert released_after(single, "ふるいです好") == "ふるいです"  # ended by a letter, for once


@pytest.mark.parametrize("unit", ["mill", "ふるい", "=", " ", "\u0301"])
def test_a_long_word_is_not_looked_at_again_and_again(monkeypatch, unit):
    """Nor is a line of marks, or a run of blanks: the characters pretokenized do not grow with the square."""
    tokenizer = train_text_tokenizer(TEXTS, 420)
    looked_at = []
    pretokenize = TextTokenizer.pretokenize
    monkeypatch.setattr(TextTokenizer, "pretokenize", lambda s, t: looked_at.append(len(t)) or pretokenize(s, t))
    text = unit * (1000 // len(unit)) + " end "
    assert [i for ids in stream(tokenizer, list(text)) for i in ids] == tokenizer.encode(text)
    assert sum(looked_at) < 5 * len(text)


def test_a_long_text_is_not_held():
    tokenizer = train_text_tokenizer(TEXTS, 420)
    state, longest = init_incremental(), 0
    for character in "".join(TEXTS) * 5:
        state, _ = push(tokenizer, state, character)
        longest = max(longest, len(state.held))
    assert longest <= 12


def test_states_are_values(tokenizer):
    """A state can be kept and continued twice: nothing is remembered elsewhere."""
    state, _ = push(tokenizer, init_incremental(), "the mi")
    for _ in range(2):
        assert push(tokenizer, state, "ll!") == push(tokenizer, state, "ll!")
    assert push(tokenizer, init_incremental(), "") == (init_incremental(), [])
    assert flush(tokenizer, init_incremental()) == []


def test_every_character_that_joins_is_known():
    """All second halves of canonical composites, and all characters with a combining class."""
    for i in range(0x110000):
        parts = unicodedata.decomposition(chr(i)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            pair = "".join(chr(int(part, 16)) for part in parts)
            if unicodedata.normalize("NFC", pair) != pair:
                assert _joins_previous(pair[1]), hex(i)
        if unicodedata.combining(unicodedata.normalize("NFD", chr(i))[0]):
            assert _joins_previous(chr(i)), hex(i)
    for first, second in (("ᄒ", "ᅡ"), ("하", "ᆫ")):
        assert len(unicodedata.normalize("NFC", first + second)) == 1
        assert _joins_previous(second)
