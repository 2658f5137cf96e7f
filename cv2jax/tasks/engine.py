"""The engine of a model, whatever it lies in: a model directory or a bundle, which needs no model's code."""

import os

from cv2jax.synthesis.bundle_engine import EngineOptions, make_bundle_engine
from cv2jax.synthesis.bundle_files import is_bundle
from cv2jax.synthesis.engine import Engine


def load_engine(model: str | os.PathLike[str], options: EngineOptions = EngineOptions()) -> Engine:
    """The engine of a model directory or of a bundle, on this process's first device.

    Raises UserError as `load_model_engine` and `make_bundle_engine`.
    """
    if is_bundle(model):
        return make_bundle_engine(model, options)
    from cv2jax.tasks.model_engine import load_model_engine  # flax and Orbax, which a bundle does without

    return load_model_engine(model, options)
