"""Golden tables: how the parameters of each official stage lie on a pod. Written anew by

    python -m tests.parallel.sharding_tables

A line a parameter: its path, its sizes, the mesh axis that splits each, and into how many parts that cuts it.
"""

import math
import os
import pathlib
import tempfile

import jax
from jax.sharding import AbstractMesh

from cv2jax.config import load_config
from cv2jax.jobs.plan_standin import make_stand_in_task
from cv2jax.parallel.mesh import AXES
from cv2jax.parallel.sharding import abstract_state

STAGES = ("speech_tokenizer", "text_speech_lm", "flow_matching", "hift_vocoder", "speaker_encoder")
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "shardings"
MESH = AbstractMesh((8, 16, 2), AXES)  # 256 chips, every axis at work


def table(stage: str) -> str:
    """The table of a stage at official size."""
    with tempfile.TemporaryDirectory() as place:
        task = make_stand_in_task(load_config(f"{stage}_official"), pathlib.Path(place))
    abstract, _ = abstract_state(task.init_state, MESH)
    lines = [f"# {stage}_official on data=8 fsdp=16 tensor=2"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        parts = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        lines.append(f"{name} {list(leaf.shape)} {','.join(str(axis or '-') for axis in spec) or '-'} {parts}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for each in STAGES:
        (GOLDENS / f"{each}.txt").write_text(table(each), encoding="utf-8")
