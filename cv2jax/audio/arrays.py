"""One source for numpy and jax: numpy arrays in, numpy arrays out; anything else runs (and traces) in jax."""

from types import ModuleType
from typing import Any

import numpy as np


def array_namespace(*arrays: Any) -> ModuleType:
    """Return `numpy` if every array given (None aside) is a numpy array, else `jax.numpy`, imported only then."""
    if all(array is None or isinstance(array, np.ndarray | np.generic) for array in arrays):
        return np
    import jax.numpy as jnp

    return jnp


def matmul(xp: ModuleType, left: Any, right: Any) -> Any:
    """Multiply `[..., n k]` by `[k m]` in the full precision of fp32, which TPUs and TF32 GPUs do not use by default."""
    if xp is np:
        return np.matmul(left, right)
    return xp.matmul(left, right, precision="highest")


def as_float(xp: ModuleType, array: Any) -> Any:
    """Return `array` as float32; float64 stays as it is, half precisions are widened, integers are a TypeError."""
    array = xp.asarray(array)
    if array.dtype.kind in "biu":
        raise TypeError(f"audio must be floating point in [-1, 1], not {array.dtype}; divide 16-bit samples by 32768")
    return array if array.dtype == np.float64 else array.astype(np.float32)
