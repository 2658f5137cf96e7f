"""Files that appear whole or not at all, and their names as text."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from cv2jax.config import UserError


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path as text for a UTF-8 file: bytes of it that are no UTF-8, which Python keeps as surrogates, as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def utf8_path(path: str | os.PathLike[str], library: str) -> str:
    """A path as the text that `library` takes; UserError where it has bytes that are no UTF-8, which that does not take."""
    text = os.fspath(path)
    if printable(path) != text:
        raise UserError(f"{path}: {library} takes no path with bytes that are not UTF-8; rename it")
    return text


def temporary_beside(path: str | os.PathLike[str]) -> pathlib.Path:
    """A hidden name for `path` in the making that no other writer has: no thread, and no process of the same id elsewhere."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], error: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, on the disk by then, and disappears where anything fails.

    Folders on the way are made. Raises UserError where it cannot be written: `error`, with the reason in place of `{reason}`.
    """
    path = pathlib.Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as failure:
        raise UserError(error.replace("{reason}", str(failure.strerror or failure))) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
