"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from cv2jax.config import UserError

_SUFFIX = ".unfinished"


@contextlib.contextmanager
def staged_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory beside `directory` that takes its place at the end, and disappears where anything fails, SIGTERM too.

    What a process left there that was killed is removed first. `directory` is new or empty. Raises UserError where it cannot
    be written; one that is raised inside names `directory`.
    """
    directory = directory.absolute()  # "." has no name
    place = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}{_SUFFIX}")
    with _exit_on_sigterm():
        try:
            place.mkdir(parents=True)
            _remove_leftovers(directory)
            with _locked(place):
                yield place
                os.replace(place, directory)
        except OSError as error:
            if _is_elsewhere(error, place):
                raise
            reason = str(error.strerror or error).replace(str(place), str(directory))
            raise UserError(f"{directory}: cannot be written ({reason}); make room or give another place") from error
        except UserError as error:
            raise UserError(str(error).replace(str(place), str(directory))) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked(place: pathlib.Path) -> Iterator[bool]:
    """Whether the directory is locked, by this process alone: the lock goes with the process, however that ends."""
    descriptor, locked = None, False
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody then takes it for a leftover
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what processes that are gone have left beside `directory`."""
    before = f".{directory.name}."
    with contextlib.suppress(OSError):  # a folder that may not be listed
        for place in directory.parent.iterdir():
            token = place.name.removeprefix(before).removesuffix(_SUFFIX)
            if place.name != f"{before}{token}{_SUFFIX}" or "." in token:
                continue
            with _locked(place) as is_left:
                # An empty one may be new, and not locked yet.
                if is_left and any(place.iterdir()):
                    shutil.rmtree(place, ignore_errors=True)


def _is_elsewhere(error: OSError, place: pathlib.Path) -> bool:
    """Whether an error is of other files, which it names, than those of `place` and the folders that it lies in."""
    names = [pathlib.Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    return bool(names) and not any(name.is_relative_to(place) or place.is_relative_to(name) for name in names)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as an exit does, which cleans up, unless someone has another use for it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
