"""English cardinals, and the optional wetext: which normaliser is active and what is handed to it."""

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator

import pytest

from cv2jax.config import UserError
from cv2jax.text import normalize
from cv2jax.text.normalize import active_normalizer, normalize_text, spell_cardinal, spell_out_numbers


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ("0", "zero"),
        ("000", "zero"),
        ("007", "seven"),
        ("13", "thirteen"),
        ("40", "forty"),
        ("99", "ninety-nine"),
        ("101", "one hundred and one"),
        ("1000", "one thousand"),
        ("1001", "one thousand and one"),
        ("1100", "one thousand, one hundred"),
        ("10010", "ten thousand and ten"),
        ("1000001", "one million and one"),
        ("2000300", "two million, three hundred"),
        ("1234567", "one million, two hundred and thirty-four thousand, five hundred and sixty-seven"),
        ("1" + "0" * 33, "one decillion"),
        ("2" + "0" * 36, "two" + " zero" * 36),
        ("٤٢", "forty-two"),
    ],
)
def test_cardinals(digits, expected):
    assert spell_cardinal(digits) == expected
    assert spell_out_numbers(f"a{digits}b") == f"a{expected}b"


@pytest.mark.parametrize("digits", ["", "-1", "1.5", "²", "x"])
def test_a_number_is_digits(digits):
    with pytest.raises(UserError, match=r"^number .*: expected decimal digits only$"):
        spell_cardinal(digits)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], str] | None], list[dict]]]:
    """Put a wetext that reads with the given function, or None for a machine without it, in the package's place."""
    calls: list[dict] = []

    def put(read: Callable[[str], str] | None) -> list[dict]:
        module = None
        if read is not None:
            module = types.ModuleType("wetext")
            module.__spec__ = importlib.machinery.ModuleSpec("wetext", None)

            def make(**options: object) -> types.SimpleNamespace:
                calls.append(options)
                return types.SimpleNamespace(normalize=read)

            module.Normalizer = make
        monkeypatch.setitem(sys.modules, "wetext", module)
        return calls

    normalize._load_wetext.cache_clear()
    yield put
    normalize._load_wetext.cache_clear()


def test_without_wetext(install):
    install(None)
    assert active_normalizer() == active_normalizer("none") == "none"
    assert normalize_text("3 cats") == "three cats"
    with pytest.raises(UserError, match=r"^normalizer wetext: it is not installed here: pip install wetext"):
        normalize_text("3", normalizer="wetext")


def test_with_wetext(install):
    calls = install(lambda text: text.strip().replace("3.5", "三点五"))
    assert active_normalizer() == active_normalizer("wetext") == "wetext"
    assert active_normalizer("none") == "none"
    assert normalize_text("价格 3.5 元.") == "价格三点五元。"
    assert normalize_text("价格 3.5 元", normalizer="none") == "价格3.5元"
    assert normalize_text("Größe 3.5") == "Größe 3.5"
    assert calls == [{"lang": "zh", "operator": "tn", "remove_erhua": False}]


def test_wetext_sees_no_tag_and_no_double_blank(install):
    seen = []

    def read(text: str) -> str:
        seen.append(text)
        return text.upper()

    install(read)
    assert normalize_text("a  b [laughter] <strong>c</strong> 3") == "A B [laughter] <strong>C</strong> three"
    assert seen == ["a b", "c", "3"]


def test_what_wetext_cannot_read_or_escapes(install):
    def read(text: str) -> str:
        assert "😀" not in text
        return text.replace("\\", "\\\\").replace('"', '\\"')

    install(read)
    assert normalize_text("😀 3") == "😀 three"
    assert normalize_text('say "C:\\x"') == 'say "C:\\x"'


def test_a_broken_wetext_is_named(install, monkeypatch):
    install(str)
    monkeypatch.delattr(sys.modules["wetext"], "Normalizer")
    monkeypatch.setattr(normalize.importlib, "import_module", _fail)
    with pytest.raises(UserError, match=r"^normalizer wetext: it is installed but does not load \(no kaldifst\)"):
        normalize_text("3")


def _fail(name: str) -> None:
    raise ImportError("no kaldifst")


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(UserError, match=r"^normalizer 'frd': expected one of auto, none, wetext$"):
        normalize_text("a", normalizer="frd")


def test_the_real_wetext():
    pytest.importorskip("wetext")
    normalize._load_wetext.cache_clear()
    assert normalize_text("价格 3.5 元 [laughter] 对", normalizer="wetext") == "价格三点五元[laughter]对"
    assert normalize_text('He said "3.14  apples" [mn]', normalizer="wetext") == (
        'He said "three point one four apples" [mn]'
    )
