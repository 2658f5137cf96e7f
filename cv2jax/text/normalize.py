"""Text normalisation before the tokenizer: Chinese and English as upstream, any other language left alone.

After `cli/frontend.py:127-160` and `utils/frontend_utils.py` of the official code (spec official 2.2), with these
differences, each of them a defect there:
- a decimal point between digits stays, and " - " in a Chinese text is a comma whatever stands beside it (quirk Q22);
- a run of blanks or a line break between two Latin words of a Chinese text becomes one space instead of joining them;
- in English, superscripts stay (upstream reads every "²" as "zero") and a number too long to name is read by digits;
- a text in another script is not treated as English, nor Japanese as Chinese: only its white space is collapsed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from cv2jax.config import UserError
from cv2jax.text.tags import split_tags

Language = Literal["zh", "en", "other"]  # what the rules tell apart
NORMALIZERS = ("auto", "none", "wetext")

_CHINESE = re.compile("[\u4e00-\u9fff]")
# Kana and hangul letters; not the marks "・" and "ー", which Chinese text borrows.
_JAPANESE_OR_KOREAN = re.compile(
    "[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff6f\uff71-\uff9d\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"
)
_CODES: dict[str, Language] = {"zh": "zh", "cmn": "zh", "en": "en"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANKS = re.compile(r"[ \t\r\n]+")
_SENTENCE_DOT = re.compile(r"(?<![0-9])\.|\.(?![0-9])")
_SILENT_BRACKETS = str.maketrans("", "", "（）【】`")

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = (
    *("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion", " sextillion"),
    *(" septillion", " octillion", " nonillion", " decillion"),
)


def detect_language(text: str) -> Language:
    """Guess from the letters: Chinese characters without kana or hangul, only basic Latin, or anything else.

    Upstream takes whatever has no Chinese character for English (spec official 2.2). A text without letters is English.
    """
    if _JAPANESE_OR_KOREAN.search(text):
        return "other"
    if _CHINESE.search(text):
        return "zh"
    return "en" if all(c.isascii() or not c.isalpha() for c in text) else "other"


def resolve_language(text: str, language: str | None) -> Language:
    """The language to treat a text as: a code such as "en", "en-GB", "zh" or "cmn", or None to detect it.

    Every other code is "other". Raises UserError for an empty code.
    """
    if language is None:
        return detect_language(text)
    if not language.strip():
        raise UserError('language: it is empty; give a code such as "en" or "zh", or none to detect it')
    code = re.split("[-_]", language.strip().lower())[0]
    return _CODES.get(code, "other")


def is_left_alone(text: str) -> bool:
    """Tell whether a text goes to the tokenizer as it is: empty, or with control tokens `<|…|>` (spec official 2.2)."""
    return not text or ("<|" in text and "|>" in text)


def active_normalizer(normalizer: str = "auto") -> Literal["none", "wetext"]:
    """Say which number normaliser a choice of "auto", "none" or "wetext" comes to on this machine.

    "auto" is wetext where it is installed. Raises UserError for another name, or for wetext where it is missing.
    """
    if normalizer not in NORMALIZERS:
        raise UserError(f"normalizer {normalizer!a}: expected one of {', '.join(NORMALIZERS)}")
    is_installed = importlib.util.find_spec("wetext") is not None
    if normalizer == "wetext" and not is_installed:
        raise UserError("normalizer wetext: it is not installed here: pip install wetext, or choose none")
    return "wetext" if is_installed and normalizer != "none" else "none"


def normalize_text(text: str, *, language: str | None = None, normalizer: str = "auto") -> str:
    """Text as the model reads it, tags unchanged (`text_normalize(split=False)` of cli/frontend.py, spec official 2.2).

    `language` and `normalizer` as in `resolve_language` and `active_normalizer`. Raises UserError for a bad choice of
    them, and for half of a surrogate pair in the text, which no tokenizer can read.
    """
    broken = _SURROGATE.search(text)
    if broken:
        raise UserError(f"text: character {broken.start()} is half of a surrogate pair")
    kind, active = resolve_language(text, language), active_normalizer(normalizer)
    if is_left_alone(text):
        return text
    if kind == "other":
        return " ".join(text.split())
    text = text.strip()
    if active == "wetext":
        text = _read_between_tags(text, _load_wetext(kind))
    return _normalize_chinese(text) if kind == "zh" else spell_out_numbers(text)


def _read_between_tags(text: str, read: Callable[[str], str]) -> str:
    """Let a normaliser that knows no tags read what lies between them; it strips blanks, which go back on."""
    parts = []
    for segment in split_tags(text):
        core = segment.text.strip()
        if segment.is_tag or not core:
            parts.append(segment.text)
            continue
        before, _, after = segment.text.partition(core)
        # Its English grammar has no answer for two blanks in a row, and fails.
        parts.append(before + read(_BLANKS.sub(" ", core)) + after)
    return "".join(parts)


@functools.cache
def _load_wetext(kind: str) -> Callable[[str], str]:
    """One language's reader of numbers, dates and units; raises UserError if wetext is there but does not load."""
    try:
        # Upstream lets it guess the language a second time; "2024" in a text known to be English came out in Chinese.
        read = importlib.import_module("wetext").Normalizer(lang=kind, operator="tn", remove_erhua=False).normalize
    except ImportError as error:
        raise UserError(f"normalizer wetext: it is installed but does not load ({error}); choose none") from error

    def read_safely(text: str) -> str:
        try:
            spoken = read(text)
        except AssertionError:
            return text  # its grammar fails on some mixtures, such as an emoji in English: better unread than lost
        # Whatever it rewrites comes back with its own escapes: \\" for a quotation mark, two backslashes for one.
        return text if spoken == text else re.sub(r'\\(["\\])', r"\1", spoken)

    return read_safely


def _normalize_chinese(text: str) -> str:
    text = re.sub(" +- +", "，", text)  # before the blanks go, for the rule to find them
    text = _drop_blanks(text)
    text = text.replace("²", "平方").replace("³", "立方")
    text = _SENTENCE_DOT.sub("。", text)
    text = text.translate(_SILENT_BRACKETS).replace("——", " ")
    return re.sub(r"[，,、]+\Z", "。", text)


def _drop_blanks(text: str) -> str:
    """Blanks separate words only where both neighbours are ASCII; Chinese has none."""

    def keep(match: re.Match[str]) -> str:
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        return " " if before and after and (before + after).isascii() else ""

    return _BLANKS.sub(keep, text)


def spell_out_numbers(text: str) -> str:
    """Replace every run of decimal digits by its English cardinal: "21" by "twenty-one" (utils/frontend_utils.py)."""
    return re.sub(r"\d+", lambda match: spell_cardinal(match.group()), text)


def spell_cardinal(digits: str) -> str:
    """Name a whole number in British English, "one thousand, two hundred and one", as `inflect` does.

    Beyond 36 digits there is no name (inflect fails there), and digits are read singly. Raises UserError for anything
    but decimal digits.
    """
    if not digits.isdecimal():
        raise UserError(f"number {digits[:40]!a}: expected decimal digits only")
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0") or "0"
    if len(plain) > 3 * len(_SCALES):
        return " ".join(_SMALL[int(digit)] for digit in plain)
    number, groups = int(plain), []
    for scale in _SCALES:
        number, group = divmod(number, 1000)
        if group or not (number or groups):
            groups.insert(0, _spell_group(group) + scale)
        if not number:
            break
    joint = " and " if 0 < int(plain[-3:]) < 100 else ", "
    return joint.join(filter(None, (", ".join(groups[:-1]), groups[-1])))


def _spell_group(number: int) -> str:
    """Name a number below a thousand."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    small = _SMALL[rest] if rest < 20 else _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
    if not hundreds:
        return small
    return f"{_SMALL[hundreds]} hundred" + (f" and {small}" if rest else "")
