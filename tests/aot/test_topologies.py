"""The train step compiles for TPU pods that are not here, and fits their memory (needs libtpu, no TPU)."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import dataclasses
import re

import pytest
from jax.experimental import topologies

from cv2jax.config import DataConfig, MeshConfig, load_config
from cv2jax.data.batch import batch_spec
from cv2jax.data.buckets import Bucket
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks.speech_tokenizer import make_task
from cv2jax.train.step import lower_step
from tests.small_corpus import make_small_corpus

pytestmark = pytest.mark.aot
GIB = 2**30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_corpus(tmp_path_factory.mktemp("corpus") / "prepared")


def compile_for(preset, topology, mesh, rows, seconds, corpus, tmp_path, **kwargs):
    import jax

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **kwargs).devices
    config = load_config(preset)
    config = dataclasses.replace(config, data=DataConfig(corpus=str(corpus)), compute_dtype="bfloat16")
    task = make_task(config)
    made = make_mesh(mesh, devices)
    abstract, shardings = abstract_state(task.init_state, made)
    bucket = Bucket(num_samples=16000 * seconds, num_text=128, batch_size=rows, num_utterances=rows)
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in batch_spec(bucket).items()}
    return lower_step(task.make_step(), abstract, shardings, specs, made).compile(), abstract


@pytest.mark.parametrize(
    ("topology", "mesh", "kwargs"),
    [
        ("v5e:4x4", MeshConfig(fsdp=4, tensor=2), {}),
        ("v6e:2x4", MeshConfig(fsdp=8), {}),
        ("v5p:2x2x2", MeshConfig(tensor=2), {}),
        ("v5e:2x4", MeshConfig(fsdp=4), {"num_slices": 2}),
    ],
)
def test_the_tiny_step_compiles(topology, mesh, kwargs, corpus, tmp_path):
    compiled, _ = compile_for("speech_tokenizer_tiny", topology, mesh, 32, 4, corpus, tmp_path, **kwargs)
    assert compiled.memory_analysis().temp_size_in_bytes < GIB


def test_the_base_step_fits_a_chip_of_sixteen_gigabytes(corpus, tmp_path):
    rows = 4 * round(load_config("speech_tokenizer_base").data.batch_seconds / 30)  # its longest bucket on each of four
    compiled, _ = compile_for("speech_tokenizer_base", "v5e:2x2", MeshConfig(), rows, 30, corpus, tmp_path)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 15.75 * GIB


@pytest.mark.full  # minutes of two cores
def test_the_official_step_fits_sixteen_v5e(corpus, tmp_path):
    rows = round(load_config("speech_tokenizer_official").data.batch_seconds / 30)  # its longest bucket
    compiled, abstract = compile_for(
        "speech_tokenizer_official", "v5e:4x4", MeshConfig(fsdp=16), rows, 30, corpus, tmp_path
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 15.75 * GIB
    # FSDP is real: weights are gathered layer by layer, and no device holds the whole state.
    import jax

    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert memory.argument_size_in_bytes < 1.3 * whole / 16 + 64 * 2**20
    assert re.search("all-gather", compiled.as_text())
