"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from cv2jax.config import UserError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], error: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, on the disk by then, and disappears where anything fails.

    Folders on the way are made. Raises UserError where it cannot be written: `error`, with the reason in place of `{reason}`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
