"""Packages that only the official side needs."""

import pytest

from cv2jax.config import UserError
from cv2jax.convert.extras import import_official


def test_a_package_that_is_there():
    assert import_official("json").dumps([1]) == "[1]"


def test_a_missing_package_is_one_line_with_the_command():
    with pytest.raises(UserError, match=r"^no_such_package is not installed.*pip install 'cv2jax\[official\]'$"):
        import_official("no_such_package")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_official("half_a_package")
