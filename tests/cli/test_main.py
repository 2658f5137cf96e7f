"""The dispatcher: overview, help of every verb, one line and exit code 2 for a mistake, no JAX before it is needed."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from absl import flags, logging

import cv2jax
from cv2jax.cli import main as cli
from cv2jax.config import UserError

FOLDER = pathlib.Path(cli.__file__).parent
HEAVY = ("jax", "flax", "numpy", "grain", "orbax", "optax", "librosa", "matplotlib", "tensorboardX", "soundfile")


def _defined_flags(verb: str) -> set[str]:
    """Names in the DEFINE_ calls of a verb's file."""
    tree = ast.parse((FOLDER / f"{verb}.py").read_text(encoding="utf-8"))
    return {
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1].startswith("DEFINE_")
        and isinstance(node.args[0], ast.Constant)
    }


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def play_verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb `play` whose `main` a test may replace."""
    module = types.ModuleType("cv2jax.cli.play", "Play.\n\nMore about it.")
    module.USAGE = "FILE [flags]"  # pyrefly: ignore
    module.define_flags = lambda values: flags.DEFINE_integer("loud", 1, "How loud.", flag_values=values)  # pyrefly: ignore
    module.main = lambda args, values: None  # pyrefly: ignore
    monkeypatch.setattr(cli, "verbs", lambda: ["play"])
    monkeypatch.setitem(sys.modules, "cv2jax.cli.play", module)
    return module


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_lists_every_verb_with_its_summary(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(argv) == 0
    rows = dict(re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert sorted(rows) == cli.verbs()
    assert {"corpus", "prepare", "train"} <= set(rows)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cv2jax.__version__


@pytest.mark.parametrize("verb", cli.verbs())
def test_help_of_a_verb_explains_its_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cv2jax {verb} ")
    assert f"cv2jax {verb} " in shown.split("\n", 1)[1], "the help has no example"
    for flag in _defined_flags(verb):
        assert re.search(rf"--(\[no\])?{flag}\b", shown), f"--{flag} is not explained"


@pytest.mark.parametrize("verb", cli.verbs())
def test_a_verb_refuses_an_unknown_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([verb, "--no_such_flag=1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"cv2jax {verb}: ")
    assert "no_such_flag" in message
    assert message.count("\n") == 1


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "train" in message


def test_flags_and_positionals_reach_the_verb(play_verb: types.ModuleType) -> None:
    seen = []
    play_verb.main = lambda args, values: seen.append((args, values.loud))
    assert cli.run(["play", "a.wav", "--loud=3", "b.wav"]) == 0
    assert seen == [(["a.wav", "b.wav"], 3)]


def test_exit_code_of_a_verb_is_kept(play_verb: types.ModuleType) -> None:
    play_verb.main = lambda args, values: 75
    assert cli.run(["play"]) == 75


def test_bad_flag_value(play_verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["play", "--loud=very"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "loud" in message
    assert "very" in message


def test_user_error_is_one_line_and_exit_2(play_verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(args: list[str], values: flags.FlagValues) -> None:
        raise UserError("a.wav is empty; record it again")

    play_verb.main = refuse
    assert cli.run(["play", "a.wav"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "cv2jax play: a.wav is empty; record it again\n"
    assert printed.out == ""


def test_a_defect_is_not_hidden(play_verb: types.ModuleType) -> None:
    def fail(args: list[str], values: flags.FlagValues) -> None:
        raise ZeroDivisionError

    play_verb.main = fail
    with pytest.raises(ZeroDivisionError):
        cli.run(["play"])


def test_interrupt_exits_with_130(play_verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: list[str], values: flags.FlagValues) -> None:
        raise KeyboardInterrupt

    play_verb.main = interrupt
    assert cli.run(["play"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in cli.verbs())], ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = """
import json, sys
from cv2jax.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    done = _python(code, *argv)
    assert done.returncode == 0, done.stderr
    code_returned, modules = json.loads(done.stdout.splitlines()[-1])
    assert code_returned == 0
    assert not set(HEAVY) & set(modules)


def test_importing_the_package_imports_only_itself() -> None:
    done = _python("import sys, cv2jax; print(*(m for m in sys.modules if '.' not in m))")
    assert done.returncode == 0, done.stderr
    assert not {*HEAVY, "absl"} & set(done.stdout.split())


def test_console_entry_exits_with_the_code_of_the_verb() -> None:
    command = [sys.executable, "-m", "cv2jax.cli.main", "prepare", "only_one_argument"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("cv2jax prepare: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_place_that_cannot_be_written_is_one_line(
    play_verb: types.ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    play_verb.main = lambda args, values: (tmp_path / "none" / "a.txt").write_text("a")
    assert cli.run(["play"]) == 2
    assert capsys.readouterr().err == f"cv2jax play: {tmp_path}/none/a.txt: No such file or directory\n"


@pytest.mark.parametrize("error", [OSError("no file named"), BrokenPipeError(32, "a worker's pipe")])
def test_an_os_error_without_a_place_is_a_defect(play_verb: types.ModuleType, error: OSError) -> None:
    def fail(args: list[str], values: flags.FlagValues) -> None:
        raise error

    play_verb.main = fail
    with pytest.raises(OSError, match=str(error.args[-1])):
        cli.run(["play"])


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_ends_it_quietly(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cv2jax.cli.main", *words]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(("process", "level"), [(0, logging.INFO), (1, logging.WARNING)])
def test_one_process_tells_the_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, process: int, level: int
) -> None:
    import jax

    import cv2jax.tasks
    import cv2jax.train.loop

    levels: list[int] = []
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(cv2jax.tasks, "make_task", lambda config: None)
    monkeypatch.setattr(cv2jax.train.loop, "train", lambda *_: levels.append(logging.get_verbosity()) or 0)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        assert cli.run(["train", "speech_tokenizer_tiny", f"--workdir={tmp_path}"]) == 0
    finally:
        logging.set_verbosity(before)
    assert levels == [level]
