"""Long texts in pieces that are spoken one after the other: cut at the ends of clauses, merged up to a length."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

from cv2jax.config import UserError
from cv2jax.text.normalize import is_left_alone, normalize_text, resolve_language
from cv2jax.text.tags import TAGS

_TERMINATORS = {
    "zh": frozenset("。？！；：、.?!;"),
    "en": frozenset(".?!;:"),
    "other": frozenset("。？！；：、.?!;:।۔؟؛｡"),
}
_COMMAS = frozenset("，,")
_FULL_STOP = {"zh": "。", "en": ".", "other": ""}  # an unknown language is left alone
_CLOSING_QUOTES = frozenset('"”')
_LONGEST = 160  # of a part of a clause; from there on arriving text ends a piece with a word, too
# What a word without an end is cut between: tags, runs of Latin letters, other characters with the marks on them.
_ATOM = re.compile(rf"{'|'.join(map(re.escape, TAGS))}|[A-Za-z0-9]{{1,32}}|.", re.DOTALL)


def is_speechless(text: str) -> bool:
    """Tell whether a text has neither letter nor digit: nothing to speak (spec official 2.2, step 5)."""
    return not any(unicodedata.category(character)[0] in "LN" for character in text)


def normalize_and_split(
    text: str,
    count_tokens: Callable[[str], int],
    *,
    language: str | None = None,
    normalizer: str = "auto",
) -> list[str]:
    """Pieces of a text, ready for the tokenizer (`text_normalize(split=True)` of cli/frontend.py, spec official 2.2).

    Empty if there is nothing to speak; an empty text, or one with control tokens, is one piece as it is. Arguments and
    UserErrors are those of `normalize_text` and `split_paragraph`.
    """
    normalized = normalize_text(text, language=language, normalizer=normalizer)
    if is_left_alone(text):
        return [normalized]
    # Detected before normalising, which may take the characters away that told the language.
    pieces = split_paragraph(normalized, count_tokens, language=resolve_language(text, language))
    return [piece for piece in pieces if not is_speechless(piece)]


def split_paragraph(
    text: str,
    count_tokens: Callable[[str], int],
    *,
    language: str | None = None,
    token_max_n: int = 80,
    token_min_n: int = 60,
    merge_len: int = 20,
    comma_split: bool = False,
) -> list[str]:
    """Cut at clause ends, then merge up to `token_max_n` (`split_paragraph` of utils/frontend_utils.py, spec 2.2).

    Lengths are characters in Chinese and `count_tokens` elsewhere. A piece is closed only if it is longer than
    `token_min_n`, and a last piece shorter than `merge_len` joins the one before, so `token_max_n` is a wish. A clause of
    more than 160 is cut between words, or else between characters; upstream leaves it whole, as we do what is not longer.
    Raises UserError for lengths that are negative or out of order, or an empty language.
    """
    if not 0 <= token_min_n <= token_max_n or merge_len < 0:
        raise UserError(
            f"splitting: expected 0 <= token_min_n <= token_max_n and 0 <= merge_len, "
            f"got {token_min_n}, {token_max_n} and {merge_len}"
        )
    kind = resolve_language(text, language)
    if not text:
        return []
    terminators = _TERMINATORS[kind] | (_COMMAS if comma_split else frozenset())
    if text[-1] not in terminators:
        text += _FULL_STOP[kind]
    measure = len if kind == "zh" else count_tokens
    clauses = _cut_clauses(text, terminators, keep_repeats=kind == "other")
    clauses = [part for clause in clauses for part in _cut_long(clause, measure)]
    return _merge_clauses(clauses, measure, token_max_n, token_min_n, merge_len)


def _cut_clauses(text: str, terminators: frozenset[str], keep_repeats: bool) -> list[str]:
    """Clauses with their terminator and a closing quote behind it.

    Of several terminators in a row ("?!", "...") upstream keeps the first; where the text is to be left alone they
    stay. A quote behind a terminator that opens the text belongs to the first clause (upstream fails there, Q22b).
    """
    clauses: list[str] = []
    start = 0
    for i, character in enumerate(text):
        if character not in terminators or _joins_digits(text, i):
            continue
        if i > start:
            clauses.append(text[start : i + 1])
        elif keep_repeats and clauses:
            clauses[-1] += character
        elif keep_repeats:
            continue  # it opens the text: the first clause begins with it
        start = i + 1
        if clauses and text[start : start + 1] in _CLOSING_QUOTES:
            clauses[-1] += text[start]
            start += 1
    return [*clauses, text[start:]] if start < len(text) else clauses


def _joins_digits(text: str, i: int) -> bool:
    """Whether a mark stands inside a number or a time: 3.5, 10:30 (upstream spells them out or breaks them, Q22)."""
    return text[i - 1 : i].isdecimal() and text[i + 1 : i + 2].isdecimal()


def _cut_long(clause: str, measure: Callable[[str], int]) -> list[str]:
    """A clause in parts of up to _LONGEST: of whole words, where a word is not longer itself."""
    longest = _LONGEST
    if len(clause.encode()) <= longest or measure(clause) <= longest:  # no tokenizer makes more tokens than bytes
        return [clause]
    count = functools.cache(measure)
    parts, length = [""], 0
    for word in re.findall(r"\s*\S+|\s+", clause):
        for unit in [word] if count(word) <= longest else _atoms(word):
            number = count(unit)
            if length + number > longest and parts[-1]:
                parts.append("")
                length = 0
            parts[-1] += unit
            length += number
    return parts


def _atoms(word: str) -> list[str]:
    """What a word may be cut between; no mark is parted from the character that bears it."""
    atoms: list[str] = []
    for atom in _ATOM.findall(word):
        if atoms and unicodedata.category(atom[0])[0] == "M":
            atoms[-1] += atom
        else:
            atoms.append(atom)
    return atoms


def _merge_clauses(
    clauses: list[str], measure: Callable[[str], int], longest: int, shortest: int, merge_len: int
) -> list[str]:
    pieces: list[str] = []
    current = ""
    for clause in clauses:
        if measure(current + clause) > longest and measure(current) > shortest:
            pieces.append(current)
            current = ""
        current += clause
    if current and pieces and measure(current) < merge_len:
        pieces[-1] += current
    elif current:
        pieces.append(current)
    return pieces
