"""Directories that appear whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from cv2jax.config import UserError


@contextlib.contextmanager
def staged_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory beside `directory` that takes its place at the end, and disappears where anything fails.

    `directory` is new or empty. Raises UserError where it cannot be written; one that is raised inside names `directory`.
    """
    directory = directory.absolute()  # "." has no name
    place = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.unfinished")
    try:
        place.mkdir(parents=True)
        yield place
        os.replace(place, directory)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory}: cannot be written ({reason}); make room or give another place") from error
    except UserError as error:
        raise UserError(str(error).replace(str(place), str(directory))) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
