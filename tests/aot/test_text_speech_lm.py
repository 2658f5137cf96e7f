"""The language model's official train step, as launched, compiles for a v5e-16 that is not here, and fits it."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import re

import jax
import pytest
from jax.experimental import topologies

from cv2jax.config import MeshConfig, load_config, override
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.step import lower_step
from tests.small_token_corpus import make_small_token_corpus

pytestmark = pytest.mark.aot
GIB = 2**30
POSITIONS = 16_384  # on each of the 16 chips, at least


@pytest.mark.full  # minutes of two cores
def test_the_official_step_fits_sixteen_v5e(tmp_path):
    corpus = make_small_token_corpus(tmp_path / "tokens")
    sets = (f"data.corpus={corpus}", "compute_dtype=bfloat16")
    config = override(load_config("text_speech_lm_official"), sets)
    assert config.data.batch_rows * config.data.row_length >= 16 * POSITIONS
    task = make_task(config)
    assert task.model_config.backbone.vocabulary_size == 151_936
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = make_mesh(MeshConfig(fsdp=16), devices)
    abstract, shardings = abstract_state(task.init_state, mesh)
    compiled = lower_step(task.make_step(), abstract, shardings, task.batch_specs()[0], mesh).compile()
    memory = compiled.memory_analysis()
    print(
        f"temp {memory.temp_size_in_bytes / GIB:.2f} GiB, arguments {memory.argument_size_in_bytes / GIB:.2f} GiB a chip"
    )
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 15.75 * GIB
    # FSDP is real: no chip holds the whole state, and weights are gathered. Attention is a kernel, not [B H T T] logits.
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert memory.argument_size_in_bytes < 1.3 * whole / 16 + 64 * 2**20
    text = compiled.as_text()
    assert re.search("all-gather", text)
    assert text.count("splash") > 0
    assert "2048,2048]" not in text  # no logits of all positions
