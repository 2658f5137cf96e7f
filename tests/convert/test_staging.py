"""A staged directory: whole at its place or not there at all, and whatever is said of it names its place."""

import os

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
