"""Pieces of arriving text: nothing is lost, borders lie at clauses, and pushes do not move them."""

import numpy as np
import pytest

from cv2jax.synthesis import arriving
from cv2jax.synthesis.arriving import ArrivingPieces
from cv2jax.text.tokenizer import train_text_tokenizer

CLAUSE = "the quick brown fox jumps over the lazy dog by the river"  # 12 tokens
TOKENIZER = train_text_tokenizer([f"{CLAUSE} {CLAUSE}"] * 3, 400)


def count(text):
    return len(TOKENIZER.encode(text))


def cut(text, sizes=()):
    pieces, parts = [""], []
    splitter, place = ArrivingPieces(count), 0
    for size in [*sizes, len(text)]:
        parts += splitter.push(text[place : place + size])
        place += size
    for part, ends in parts + splitter.flush():
        pieces[-1] += part
        if ends:
            pieces.append("")
    return [piece for piece in pieces if piece]


TEXTS = {
    "sentences": f"{CLAUSE}. " * 12,
    "numbers": f"It costs 3.5 and {CLAUSE} {CLAUSE} {CLAUSE} {CLAUSE} 3.5 or 1.2.3. And more! " * 4,
    "quotes": f'He said: "{CLAUSE} {CLAUSE} {CLAUSE} {CLAUSE} {CLAUSE}!" Then he went... "Oh?!" {CLAUSE}.' * 3,
    "no end": f"{CLAUSE} " * 30,
    "chinese": "今天天气很好我们一起去公园散步然后回家吃饭。" * 20,
    "no words": "... !!! \n\n ...",
    "no blanks": "a" * 500 + "[breath]" * 200 + "e\u0301" * 200,
    "words late": " \n... " + f"{CLAUSE}.\n" * 3,
}


@pytest.mark.parametrize("name", TEXTS)
def test_pushes_do_not_move_borders_and_nothing_is_lost(name):
    text, rng = TEXTS[name], np.random.default_rng(0)
    want = cut(text)
    for _ in range(3):
        assert cut(text, rng.integers(0, 9, 400).tolist()) == want
    assert cut(text, [1] * len(text)) == want
    squeeze = lambda t: "".join(t.split())  # noqa: E731
    assert squeeze("".join(want)) == ("" if name == "no words" else squeeze(text))


def test_borders_lie_at_clauses():
    assert [piece[-1] for piece in cut(TEXTS["sentences"])[:-1]] == [".", "."]
    assert all(piece.rstrip().endswith(("more!", "1.2.3.")) for piece in cut(TEXTS["numbers"]))
    assert all(piece.rstrip()[-1] in '."' for piece in cut(TEXTS["quotes"]))
    assert len(cut(TEXTS["quotes"])) == 4


def test_a_text_without_clauses_ends_at_words():
    pieces = cut(TEXTS["no end"])
    assert len(pieces) == 3
    assert all(piece.endswith(" ") for piece in pieces[:2])
    assert all(160 <= count(piece) <= 162 for piece in pieces[:2])


def test_short_text_is_one_piece():
    assert cut("Yes. No. Maybe!") == ["Yes. No. Maybe!"]
    assert cut("  \n ") == []


def test_what_has_no_blanks_is_cut_between_characters_but_not_in_tags():
    pieces = cut(TEXTS["no blanks"])
    assert max(map(count, pieces)) <= 192
    assert all(piece.count("[") == piece.count("]") and piece[0] != "\u0301" for piece in pieces)
    assert all(piece.endswith(" ") for piece in cut("café " * 400)[:-1])  # é is no place to cut at
    assert all(piece[0] == "ก" for piece in cut("ก\u0e34\u0e48" * 200))  # nor in front of a mark


@pytest.mark.parametrize(
    "text",
    ["1" * 1_300, "12345678901234567 " * 40, "कखगघङ " * 100, "ကခဂဃ" * 200, "<" * 900 + "a", "a" + "\u0301" * 900],
)
def test_a_piece_is_as_long_as_its_tokens_say(text):
    pieces = cut(text)
    assert max(map(count, pieces)) <= 2 * 192
    marks = "\u0301<"  # what has nothing to speak may be dropped
    assert "".join(pieces).strip(marks) == text.strip(marks)


def test_a_word_that_ends_is_not_cut():
    words = ["1" * 150, "2" * 150, "3" * 40]
    assert cut(" ".join(words)) == [f"{words[0]} {words[1]} ", words[2]]


def test_what_has_nothing_to_speak_is_looked_at_once(monkeypatch):
    seen, look = [], arriving.is_speechless
    monkeypatch.setattr(arriving, "is_speechless", lambda text: (seen.append(len(text)), look(text))[1])
    for text in ("😀" * 500, " " * 500, "<" * 500):
        assert cut(text, [1] * len(text)) == []
        assert sum(seen) <= len(text) + 1
        seen.clear()
        [piece] = cut(text + "one")
        assert piece.endswith("one")
        assert count(piece) <= 192  # as the pieces of whole text that have no words, the most of it is dropped
        seen.clear()


def test_a_line_that_is_complete_ends_a_piece():
    splitter = ArrivingPieces(count)
    assert splitter.end() == []
    assert splitter.push("\n") + splitter.end() == []
    assert splitter.push("one two.\n") + splitter.end() == [("one two.\n", False), ("", True)]
    assert splitter.end() == []
    assert splitter.push(" and") + splitter.flush() == [("and", False)]
    assert splitter.push(f"{CLAUSE} " * 6 + ".\n")[-1][1] is False  # the mark waits for what follows
    assert splitter.end() == [("\n", True)]
    assert splitter.push("...") + splitter.end() == []  # not spoken with the next line
    assert splitter.push("one") + splitter.flush() == [("one", False)]
