"""A full disk as one line, whoever met it."""

import contextlib
import pathlib
from collections.abc import Iterator

from cv2jax.config import UserError

# As libraries word it: TensorStore and Orbax raise neither OSError nor an errno.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


@contextlib.contextmanager
def full_disk_reported(place: pathlib.Path) -> Iterator[None]:
    """Turns any error that says so into a UserError that names `place`; others pass."""
    try:
        yield
    except Exception as error:
        reason = next((text for text in _FULL if text in str(error)), None)
        if reason is None or isinstance(error, UserError):
            raise
        raise UserError(f"{place}: cannot write ({reason}); make room and give the same command") from error
