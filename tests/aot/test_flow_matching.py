"""The flow's official train step, as launched, compiles for a v5e-16 that is not here, and fits it, with either attention."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest
from jax.experimental import topologies

from cv2jax.config import load_config, override
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.step import lower_step
from tests.small_flow_run import make_small_flow_corpus, tokens_of

pytestmark = [pytest.mark.aot, pytest.mark.full]  # takes longer to compile than all of CI
GIB = 2**30
RATE = 24_000
SECONDS = 15


def batch_of(specs, seconds, row_seconds):
    """The shapes of a batch of so many seconds in rows of `row_seconds`, whatever the small corpus made of them."""
    sizes = {specs["waveform"].shape[1]: row_seconds * RATE, specs["speech_tokens"].shape[1]: row_seconds * 25}
    rows = seconds // row_seconds // 80 * 80
    return {
        name: jax.ShapeDtypeStruct((rows, *(sizes.get(size, size) for size in spec.shape[1:])), spec.dtype)
        for name, spec in specs.items()
    }


@pytest.mark.parametrize("attention", ["splash", "xla"])
def test_the_official_step_fits_sixteen_v5e(tmp_path, attention):
    corpus = make_small_flow_corpus(tmp_path / "corpus", RATE)
    sets = (
        f"data.corpus={corpus}",
        f"data.speech_tokens={tokens_of(corpus)}",
        "compute_dtype=bfloat16",
        f"model.attention={attention}",
        "data.num_workers=1",
    )
    config = override(load_config("flow_matching_official"), sets)
    task = make_task(config)
    assert (task.model_config.encoder.width, task.model_config.estimator.num_mid_stages) == (512, 12)
    mesh = make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    abstract, shardings = abstract_state(task.init_state, mesh)
    specs = batch_of(task.batch_specs()[0], int(config.data.batch_seconds), SECONDS)
    assert specs["speech_tokens"].shape == (160, 375)
    compiled = lower_step(task.make_step(), abstract, shardings, specs, mesh).compile()
    memory = compiled.memory_analysis()
    sizes = memory.temp_size_in_bytes / GIB, memory.argument_size_in_bytes / GIB
    print(f"{attention}: temp {sizes[0]:.2f} GiB, arguments {sizes[1]:.2f} GiB a chip")
    assert sum(sizes) < 15.75
    text = compiled.as_text()
    assert ("splash" in text) == (attention == "splash")
    assert text.count("all-reduce") > 0  # gradients of all rows
