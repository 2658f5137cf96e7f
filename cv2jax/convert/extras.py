"""Packages of the extra [official], imported where they are used: cv2jax itself needs none of them."""

import importlib
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
