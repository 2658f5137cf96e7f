"""One stage on one machine: its train step compiled ahead of time by libtpu, and what the compiled step does."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from cv2jax.audio.mel import MEL_RATE_HZ
from cv2jax.config import MeshConfig, TrainConfig, UserError, validate
from cv2jax.data.shards import Corpus
from cv2jax.jobs.plan_standin import make_stand_in_task
from cv2jax.parallel import collectives
from cv2jax.parallel.flops import Work, count_work, saved_bytes
from cv2jax.parallel.hlo import Cost, hlo_cost
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.presets import Preset, chip_of, suggest_rules
from cv2jax.parallel.roofline import Roofline, make_roofline
from cv2jax.parallel.sharding import abstract_state, axis_rules, num_batch_shards, replicated, splits_parameters
from cv2jax.tasks import make_task
from cv2jax.train.step import abstract_batch, lower_step

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Ran out of memory", "exceeded hbm capacity")
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


class DoesNotFit(Exception):
    """The step needs more memory than a chip has; `needed` and `available` bytes, 0 where the compiler does not say."""

    def __init__(self, needed: float, available: float) -> None:
        super().__init__(f"needs {needed / 2**30:.2f} GiB a chip of {available / 2**30:.2f} GiB")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Traced:
    """A stage's step on a mesh, traced but not compiled.

    Attributes:
      config: with the mesh and dtype it is planned for. specs: of the batch. shape_of: which of how many shapes.
      param_bytes, optimizer_bytes: a chip. whole_share: of the parameters' bytes, what is whole on every chip although
        the mesh splits parameters. saved: bytes a chip, `saved_bytes`. rate_hz: of the batch's audio, where it has any.
    """

    config: TrainConfig
    task: Any
    preset: Preset
    mesh: Mesh
    specs: dict[str, jax.ShapeDtypeStruct]
    shape_of: tuple[int, int]
    abstract: Any
    shardings: Any
    work: Work
    saved: float
    param_bytes: int
    optimizer_bytes: int
    whole_share: float
    num_parameters: int
    rate_hz: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled step does on one chip; sizes in bytes."""

    arguments: int
    temporaries: int
    total: int
    cost: Cost
    roofline: Roofline
    seconds: float


def require_libtpu() -> None:
    """UserError that names the extra where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the TPU compiler, is not installed: pip install 'cv2jax[aot]' (x86-64 Linux; no TPU needed)"
        )


def describe_devices(preset: Preset) -> list[jax.Device]:
    """The devices of a machine that is not here, in one list over its slices; UserError where libtpu has no such slice."""
    require_libtpu()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if preset.chip == "v4" else {}
    if math.prod(preset.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if preset.num_slices > 1:
        options["num_slices"] = preset.num_slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=preset.topology_name, **options)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--topology {preset.topology_name}: libtpu cannot describe it ({reason})") from error
    return list(found.devices)


@contextlib.contextmanager
def open_task(config: TrainConfig) -> Iterator[Any]:
    """The stage's task on its corpus, or where `data.corpus` names none on a stand-in, of which nothing is logged."""
    if config.data.corpus:
        yield make_task(config)
        return
    before = logging.get_verbosity()
    with tempfile.TemporaryDirectory(prefix="cv2jax-plan-") as place:
        logging.set_verbosity(logging.WARNING)
        try:
            task = make_stand_in_task(config, pathlib.Path(place))
        finally:
            logging.set_verbosity(before)
        yield task


def for_tpus(config: TrainConfig) -> TrainConfig:
    """The config with bfloat16 where its dtype is open."""
    if config.compute_dtype == "auto":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    validate(config)
    return config


def choose_mesh(config: TrainConfig, task: Any, preset: Preset) -> TrainConfig:
    """The config with the machine's preset where its mesh is open, parameters split where its state is not small."""
    if config.mesh != MeshConfig():
        return config
    state = jax.eval_shape(task.init_state, jax.random.key(0))
    rules = suggest_rules(sum(map(_size, jax.tree.leaves(state))), chip_of(preset))
    return dataclasses.replace(config, mesh=MeshConfig(preset=preset.name, rules=rules))


def scale_batch(config: TrainConfig, factor: float) -> TrainConfig:
    """The config with a global batch `factor` times as large; UserError where that is no whole number of rows."""
    data = config.data
    rows, multiple = data.batch_rows * factor, data.batch_multiple * factor
    if config.task == "text_speech_lm" and rows != int(rows):
        raise UserError(
            f"--batch_scale {factor:g}: data.batch_rows={data.batch_rows} would be {rows:g} rows; give another"
        )
    scaled = dataclasses.replace(
        data,
        batch_rows=max(int(rows), 1),
        batch_seconds=data.batch_seconds * factor,
        batch_multiple=max(int(multiple), 1),
    )
    return dataclasses.replace(config, data=scaled)


def trace_step(config: TrainConfig, task: Any, preset: Preset) -> Traced:
    """Traces the step for the batch with the longest rows; UserError for a mesh or batch that does not divide."""
    devices = describe_devices(preset)
    mesh = make_mesh(config.mesh, devices)
    specs = task.batch_specs()
    index = max(range(len(specs)), key=lambda i: max(math.prod(s.shape[1:]) for s in specs[i].values()))
    rows = next(iter(specs[index].values())).shape[0]
    if rows % num_batch_shards(mesh):
        what = "data.batch_rows" if config.task == "text_speech_lm" else "data.batch_seconds and data.batch_multiple"
        raise UserError(
            f"{config.name}: a batch of {rows} rows does not divide over the {num_batch_shards(mesh)} chips of "
            f"{preset.name} that share it; set {what} for a multiple, or --batch_scale"
        )
    abstract, shardings = abstract_state(task.init_state, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (abstract, abstract_batch(specs[index], mesh))
    with jax.set_mesh(mesh), axis_rules():
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=replicated(mesh))
        jaxpr: ClosedJaxpr = jax.make_jaxpr(task.make_step())(*arguments, key)
    params = jax.tree.leaves(abstract.params)
    whole = sum(_size(leaf) for leaf in params if leaf.sharding.is_fully_replicated)
    return Traced(
        config=config,
        task=task,
        preset=preset,
        mesh=mesh,
        specs=specs[index],
        shape_of=(index + 1, len(specs)),
        abstract=abstract,
        shardings=shardings,
        work=count_work(jaxpr),
        saved=saved_bytes(jaxpr) / num_batch_shards(mesh),
        param_bytes=sum(map(_shard_size, params)),
        optimizer_bytes=sum(map(_shard_size, jax.tree.leaves(abstract.opt_state))),
        whole_share=whole / max(sum(map(_size, params)), 1) if splits_parameters(mesh) else 0.0,
        num_parameters=sum(leaf.size for leaf in params),
        rate_hz=Corpus(config.data.corpus).rate_hz
        if config.data.corpus and "waveform" in specs[index]
        else MEL_RATE_HZ,
    )


def _size(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _shard_size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def compile_step(traced: Traced) -> Compiled:
    """Compiles a traced step with libtpu and measures what it does on a chip; DoesNotFit where memory is too small."""
    started = time.monotonic()
    lowered = lower_step(traced.task.make_step(), traced.abstract, traced.shardings, traced.specs, traced.mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise parse_out_of_memory(str(error)) from error
        raise
    seconds = time.monotonic() - started
    devices = list(traced.mesh.devices.flat)
    slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
    cost = hlo_cost(compiled.as_text() or "", slice_of=slices, kernels=traced.work.kernels)
    chip = chip_of(traced.preset)
    ici, dcn = collectives.seconds(cost.transfers, chip, devices, traced.preset.shape)
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    roofline = make_roofline(
        chip,
        flops=cost.flops,
        model_flops=traced.work.model_flops / len(devices),
        hbm_bytes=cost.hbm_bytes,
        ici_seconds=ici,
        dcn_seconds=dcn,
    )
    total = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(arguments, temporaries, total, cost, roofline, seconds)


def parse_out_of_memory(text: str) -> DoesNotFit:
    """What the compiler says of a program that is too large: "Used 127.5G of 15.75G hbm"."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text)
    if found is None:
        return DoesNotFit(0.0, 0.0)
    return DoesNotFit(float(found[1]) * _UNIT[found[2]], float(found[3]) * _UNIT[found[4]])


def versions() -> dict[str, str]:
    """Of what decides a plan's figures."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
