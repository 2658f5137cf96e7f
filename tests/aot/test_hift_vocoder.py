"""The vocoder compiles for a v5e-16 that is not here: its train step fits, and rows that are split talk to nobody."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import dataclasses

import jax
import pytest
from jax.experimental import topologies

from cv2jax.config import MeshConfig, load_config
from cv2jax.data.batch import batch_spec
from cv2jax.data.buckets import Bucket
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks.hift_vocoder import HiftVocoderTask
from cv2jax.train.step import lower_step

pytestmark = pytest.mark.aot
GIB = 2**30
RATE_HZ = 24_000


class NoData(CorpusBatches):
    """Stands in for a corpus: the step asks for its rate alone."""

    def __init__(self) -> None:
        self.rate_hz = RATE_HZ


@pytest.fixture(scope="module")
def mesh():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    return make_mesh(MeshConfig(fsdp=16), devices)


def compile_step(config, mesh):
    """(compiled step, abstract state) of a batch as a plan of the longest utterances makes it."""
    task = HiftVocoderTask(dataclasses.replace(config, compute_dtype="bfloat16"), NoData())
    abstract, shardings = abstract_state(task.init_state, mesh)
    seconds = config.data.max_seconds
    rows = int(config.data.batch_seconds / seconds) // config.data.batch_multiple * config.data.batch_multiple
    bucket = Bucket(num_samples=round(RATE_HZ * seconds), num_text=0, batch_size=rows, num_utterances=rows)
    specs = batch_spec(bucket, text=False, f0=True)
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in specs.items()}
    return lower_step(task.make_step(), abstract, shardings, shapes, mesh).compile(), abstract, rows


@pytest.mark.full
def test_the_official_step_fits_sixteen_v5e(mesh):
    compiled, abstract, rows = compile_step(load_config("hift_vocoder_official"), mesh)
    assert rows == 160
    memory = compiled.memory_analysis()
    sizes = memory.temp_size_in_bytes / GIB, memory.argument_size_in_bytes / GIB
    print(f"temp {sizes[0]:.2f} GiB, arguments {sizes[1]:.2f} GiB a chip")
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    print(f"state {whole / GIB:.2f} GiB")
    assert sum(sizes) < 15.75
