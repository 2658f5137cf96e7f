"""Packages of the extra [official], imported where they are used: cv2jax itself needs none of them."""

import importlib
import pathlib
from typing import Any

from cv2jax.config import UserError


def import_official(package: str) -> Any:
    """The package `onnx`, `onnxruntime` or `torch`; UserError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"{package} is not installed, and official files need it: pip install 'cv2jax[official]'"
        ) from None


_POINTER = b"version https://git-lfs"


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises UserError for a file that stands for a large one which git has not fetched yet."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: is only git's pointer to the file; fetch it with `git lfs pull`")
