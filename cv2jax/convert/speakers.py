"""`spk2info.pt`, the official table of known voices, as plain arrays and back (spec/official.md 1.3)."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cv2jax.config import UserError
from cv2jax.convert.extras import import_official
from cv2jax.convert.torch_file import as_numpy, load_values

Entry = dict[str, Any]  # name → array, or a plain value that is passed on


def read_speakers(path: pathlib.Path) -> dict[str, Entry]:
    """The entries of a file by their ids, tensors as arrays; UserError as `load_values`, and for a file of something else."""
    torch, values = import_official("torch"), load_values(path)
    if not isinstance(values, dict) or not all(isinstance(n, str) and isinstance(e, dict) for n, e in values.items()):
        raise UserError(f"{path}: is no table of speakers (id → entry); copy it again or leave it out")
    plain = lambda value: as_numpy(value).copy() if isinstance(value, torch.Tensor) else value  # noqa: E731
    try:
        return {name: {str(key): plain(value) for key, value in entry.items()} for name, entry in values.items()}
    except (TypeError, RuntimeError) as error:  # quantised, sparse
        raise UserError(f"{path}: holds tensors of an unknown kind ({str(error)[:80]}); copy it again") from None


def write_speakers(path: pathlib.Path, entries: Mapping[str, Entry]) -> None:
    """Writes entries as torch's own `torch.save` does, their arrays as tensors of the same type."""
    torch = import_official("torch")

    def tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == jnp.bfloat16:  # which torch does not know of numpy
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    values = {name: {key: tensor(value) for key, value in entry.items()} for name, entry in entries.items()}
    torch.save(values, path)
