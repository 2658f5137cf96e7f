"""The vocoder compiles for a v5e-16 that is not here: its train step fits, and rows that are split talk to nobody."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from cv2jax.config import MeshConfig, load_config
from cv2jax.data.batch import batch_spec
from cv2jax.data.buckets import Bucket
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.istft import istft, stft
from cv2jax.models.hift_vocoder.model import HiftState, HiftVocoder, init_params
from cv2jax.models.hift_vocoder.source import HarmonicSource
from cv2jax.models.hift_vocoder.stream import init_state
from cv2jax.nn.signal import Signal, Whole
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules, batch_sharding, replicated
from cv2jax.tasks.hift_vocoder import HiftVocoderTask
from cv2jax.train.step import lower_step

pytestmark = pytest.mark.aot
GIB = 2**30
RATE_HZ = 24_000
ROWS = 16  # one a chip
COLLECTIVES = re.compile("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast")


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


def compile_rows(function, mesh, params, *arguments):
    """The program of function(params, *arguments), its parameters whole on every chip, all else split by rows."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    placed = lambda tree, at: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree)  # noqa: E731
    with jax.set_mesh(mesh), axis_rules():
        lowered = jax.jit(function, out_shardings=rows).lower(placed(params, whole), *placed(arguments, rows))
    return lowered.compile().as_text()


def make_keys(seeds):
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)


def test_source_and_transforms_talk_to_nobody(mesh):
    """Forwards and backwards; what does talk is found."""
    config = HiftVocoderConfig()
    source = HarmonicSource(config)
    f0, seeds = jnp.zeros((ROWS, 25, 1)), jnp.zeros(ROWS, jnp.int32)
    params = source.init(jax.random.key(0), Whole(), Signal(f0, 1), make_keys(seeds))["params"]

    def speak(params, f0, seeds):
        made = source.apply({"params": params}, Whole(), Signal(f0, 1), make_keys(seeds))

        def copy(values):
            spectrum = stft(Whole(), made.holding(values), config.istft_points)
            return istft(Whole(), spectrum, config.istft_points).values

        wave, pull_back = jax.vjp(copy, made.values)
        return wave, pull_back(wave)

    assert not COLLECTIVES.findall(compile_rows(speak, mesh, params, f0, seeds))

    def talk(params, f0, seeds):
        return f0 + f0.sum()

    assert COLLECTIVES.findall(compile_rows(talk, mesh, params, f0, seeds))


@pytest.mark.parametrize("way", ["whole", "hop"])
def test_inference_on_rows_talks_to_nobody(mesh, way):
    config = HiftVocoderConfig(dtype="bfloat16")
    params = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))
    mel, seeds, counts = jnp.zeros((ROWS, 16, config.num_mels)), jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, 16)
    state = init_state(config, ROWS)

    def whole(params, mel, seeds, counts):
        return HiftVocoder(config).apply({"params": params}, mel, make_keys(seeds), counts).waveform

    def hop(params, mel, seeds, counts, state):
        made, after = HiftVocoder(config).apply(
            {"params": params}, mel, make_keys(seeds), HiftState(*state), counts, counts, method="step"
        )
        return made.waveform, after.num_frames, after.tails

    more = [(state.num_frames, state.tails)] if way == "hop" else []
    text = compile_rows({"whole": whole, "hop": hop}[way], mesh, params, mel, seeds, counts, *more)
    assert "convolution" in text
    assert not COLLECTIVES.findall(text)
