"""The stages: one file each that wires a model, its loss and its batches for the loop."""

import importlib
import pathlib
from typing import Any

from cv2jax.config import TrainConfig, UserError

NO_TASKS = (
    "__init__",
    "audio_task",
    "bundle",
    "bundle_parts",
    "bundle_programs",
    "encoders",
    "engine",
    "free_run",
    "heard_flow",
    "model_directory",
    "model_engine",
    "stages",
    "trained",
    "warm_start",
)


def make_task(config: TrainConfig) -> Any:
    """The task a config names, as the loop's `Task`; UserError for a name without a file, or another task's model."""
    known = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("*.py") if p.stem not in NO_TASKS)
    if config.task not in known:
        raise UserError(f"task='{config.task}' is unknown; choose one of {', '.join(known)}")
    module = importlib.import_module(f"cv2jax.tasks.{config.task}")
    if not isinstance(config.model, module.MODEL_CONFIG):
        given, wanted = type(config.model).__name__, module.MODEL_CONFIG.__name__
        raise UserError(f"model is a {given}, and task='{config.task}' needs a {wanted}; give one in the config file")
    return module.make_task(config)
