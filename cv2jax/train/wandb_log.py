"""Metrics to Weights & Biases, for those who have its package and ask for it; the one file that knows it."""

import importlib.util
import os
import pathlib
import uuid
from typing import Any

from cv2jax.config import TrainConfig, UserError, to_dict

_ID_FILE = "wandb_id"  # so that a resumed run goes on in the same curves


def wandb_project(config: TrainConfig) -> str:
    """The project that the config or CV2JAX_WANDB names, "" for none; UserError where wandb is not installed."""
    project = config.wandb or os.environ.get("CV2JAX_WANDB", "")
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb={project}: the package wandb is not installed; pip install wandb, or leave it empty")
    return project


class WandbLog:
    """A run of the project, named as the config, with an id that its workdir keeps."""

    def __init__(self, project: str, workdir: pathlib.Path, config: TrainConfig) -> None:
        place = workdir / _ID_FILE
        if not place.exists():
            place.write_text(uuid.uuid4().hex, encoding="utf-8")
        identity = place.read_text(encoding="utf-8")
        wandb: Any = importlib.import_module("wandb")
        about = {"project": project, "name": config.name, "id": identity, "dir": str(workdir)}
        try:
            self._run = wandb.init(**about, resume="allow", config=to_dict(config))
            # Not its own counter, which never goes back: a run that is resumed does.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no login, no network, a name that it refuses: it has many classes for these
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"wandb={project}: {reason}; mend that, or leave it empty") from error

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """The numbers as `kind/name`."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._run.log({"step": step} | numbers)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
