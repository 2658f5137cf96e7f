"""`cv2jax corpus`: flags to configuration, and the lines a user sees."""

from __future__ import annotations

from pathlib import Path

import absl.flags
import pytest

from cv2jax.cli import corpus
from cv2jax.config import UserError


def run(*arguments: str) -> int | None:
    flags = absl.flags.FlagValues()
    corpus.define_flags(flags)
    _, *positionals = flags(["cv2jax", *arguments])
    return corpus.main(positionals, flags)


def test_makes_a_corpus_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "corpus")
    arguments = (out, "--hours=0.005", "--voices=2", "--languages=ja,ko", "--workers=1", "--held_out_share=0.1")
    assert run(*arguments) == 0
    first = capsys.readouterr().out
    assert "ja/train" in first
    assert "hours by speaker: ja-f2" in first
    assert not (tmp_path / "corpus" / "grammar.jsgf").exists()  # there is no English to judge
    assert run(*arguments) == 0
    assert "already there, checked" in capsys.readouterr().out


def test_kinds_carry_weights() -> None:
    assert corpus.parse_kinds(["grammar:7", "free"]) == (("grammar", 7.0), ("free", 1.0))
    with pytest.raises(UserError, match="--kinds free:many"):
        corpus.parse_kinds(["free:many"])


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder OUT, and got 0"):
        run("--hours=1")
    with pytest.raises(UserError, match="the folder OUT, and got 2"):
        run("a", "b", "--hours=1")
    with pytest.raises(UserError, match="--hours is missing"):
        run(str(tmp_path / "corpus"))
