"""Files that appear whole or not at all, and their names as text."""

import os

import pytest

from cv2jax.config import UserError
from cv2jax.files import printable, utf8_path, whole_file


def test_a_file_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with whole_file(path, "") as file:
        file.write(b"one")
    with whole_file(path, "") as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def stop_half_way():
        with whole_file(path, "") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        stop_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    place = whole_file(tmp_path / "file" / "x", "no {brace}: {reason}; mend")
    with pytest.raises(UserError, match=r"^no \{brace\}: File exists; mend$"), place:
        pass
    with pytest.raises(UserError, match=r"^full: No space$"), whole_file(tmp_path / "x", "full: {reason}"):
        raise OSError(28, "No space")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_of_any_bytes_is_text(tmp_path):
    strange = os.fsdecode(b"a/\xff/\xe5\xa5\xb3")
    assert printable(strange) == "a/\\xff/女"
    assert utf8_path(tmp_path / "女", "torch") == str(tmp_path / "女")
    with pytest.raises(UserError, match="torch takes no path with bytes that are not UTF-8; rename it"):
        utf8_path(strange, "torch")
