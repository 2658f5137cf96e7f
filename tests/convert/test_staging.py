"""A staged directory: whole at its place or not there at all, and whatever is said of it names its place."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from cv2jax.config import UserError
from cv2jax.convert.staging import staged_directory


@pytest.mark.parametrize("empty", [False, True])
def test_it_appears_at_the_end(tmp_path, monkeypatch, empty):
    out = tmp_path / "new" / "out"
    if empty:
        out.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with staged_directory(out.relative_to(tmp_path)) as place:
        (place / "file").write_text("x")
        assert list(out.glob("*")) == []
        assert place.parent == out.parent  # a rename, no copy
    assert (out / "file").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (lambda place: UserError(f"{place}/file: is bad"), UserError, "{out}/file: is bad"),
        (
            lambda place: OSError(28, "No space", str(place)),
            UserError,
            "{out}: cannot be written (No space); make room",
        ),
        (lambda place: ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_a_failure_leaves_nothing_and_names_the_place(tmp_path, error, kind, message):
    out = tmp_path / "out"

    def write():
        with staged_directory(out) as place:
            (place / "file").write_text("x")
            raise error(place)

    with pytest.raises(kind) as caught:
        write()
    assert str(caught.value).startswith(message.format(out=out))
    assert os.listdir(tmp_path) == []


def test_what_came_there_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out: cannot be written"), staged_directory(out):
        (out / "theirs").mkdir(parents=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_an_error_of_another_file_stays_its_own(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), staged_directory(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", "/elsewhere")
    # A copy's error names what is read before what is written.
    with (
        pytest.raises(UserError, match=r"out: cannot be written \(No space\)"),
        staged_directory(tmp_path / "out") as place,
    ):
        raise OSError(28, "No space", "/elsewhere", None, str(place / "file"))
    assert os.listdir(tmp_path) == []


_WRITES = """
import pathlib, sys, time
from cv2jax.convert.staging import staged_directory
with staged_directory(pathlib.Path(sys.argv[1])) as place:
    (place / "file").write_text("x")
    print(place.name, flush=True)
    time.sleep(60)
"""


def stop_while_it_writes(out, number):
    """(exit code, name of the hidden directory) of a process that gets a signal while it writes `out`."""
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", _WRITES, out], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        name = process.stdout.readline().strip()
        process.send_signal(number)
    return process.returncode, name


def test_who_is_asked_to_stop_leaves_nothing(tmp_path):
    code, name = stop_while_it_writes(tmp_path / "out", signal.SIGTERM)
    assert (code, name[:5]) == (128 + signal.SIGTERM, ".out.")
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    code, name = stop_while_it_writes(tmp_path / "out", signal.SIGKILL)
    assert (code, os.listdir(tmp_path)) == (-signal.SIGKILL, [name])
    kept = [f".other{name.removeprefix('.out')}", f".out.more{name.removeprefix('.out')}"]
    for other in kept:
        (tmp_path / other).mkdir()
        (tmp_path / other / "file").write_text("x")
    with staged_directory(tmp_path / "out") as place:
        (place / "file").write_text("x")
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, place.name])
        with staged_directory(tmp_path / "out") as second:  # the first one is still at work
            assert sorted(os.listdir(tmp_path)) == sorted([*kept, place.name, second.name])
            (second / "file").write_text("y")
            (second / "file").unlink()
        assert (place / "file").is_file()
        (tmp_path / "out").rmdir()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])
