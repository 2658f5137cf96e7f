"""The fastest plan that fits: meshes, rematerialisation and batch sizes, pruned by estimates, the best of them compiled."""

import dataclasses
import math

import jax
from absl import logging

from cv2jax.config import MeshConfig, TrainConfig, UserError, flatten, override
from cv2jax.jobs.plan_compile import DoesNotFit, Traced, compile_step, for_tpus, open_task, scale_batch, trace_step
from cv2jax.jobs.plan_report import Report, batch_of, describe
from cv2jax.parallel.presets import Preset, candidate_meshes, chip_of, find_preset, mesh_flags, preset_shape
from cv2jax.parallel.sharding import num_batch_shards

_REMAT = {"model.remat": ("none", "dots", "full"), "model.backbone.remat": ("none", "dots", "full")}
_REMAT_FLAG = "model.remat_discriminators"
_ACTIVATIONS = 0.5  # of the upper bound, at least: what is left of it when the compiler has fused


@dataclasses.dataclass
class Candidate:
    """One way to run a stage, with what it is estimated to need, and its report once compiled.

    Attributes:
      scale: of the global batch. remat: the assignment, "" where the stage has none. mesh: of the run.
      gib, seconds, speed: estimates a chip, of a step, in units a second. status: what became of it.
    """

    scale: float
    remat: str
    mesh: MeshConfig
    gib: float = 0.0
    seconds: float = 0.0
    speed: float = 0.0
    status: str = "not compiled"
    report: Report = dataclasses.field(default_factory=dict)

    @property
    def planned_speed(self) -> float:
        """Units a second of the compiled plan; 0 of what does not fit or is not compiled."""
        return self.report["speed"] if self.report.get("fits") else 0.0


@dataclasses.dataclass
class Fit:
    """What was considered, in the order of the estimates, and the best that fits."""

    candidates: list[Candidate]
    best: Candidate | None


def search(config: TrainConfig, preset: Preset, compilations: int) -> Fit:
    """Compiles at most so many candidates of a stage, those of the best estimate first; progress is logged.

    Stops where no estimate left beats what was found: estimates leave things out, so they promise too much, if anything.
    """
    base = for_tpus(config)
    candidates = _estimate(base, preset, list(_candidates(base, preset)))
    if not candidates:
        raise UserError(f"{config.name}: no batch and mesh divide over {preset.name}; give another --batch_scale")
    best: Candidate | None = None
    for done in range(compilations):
        waiting = [one for one in candidates if one.status == "not compiled"]
        if not waiting or (best and waiting[0].speed <= best.planned_speed):
            break
        one = waiting[0]
        logging.info("compiling %d of at most %d: %s", done + 1, compilations, _name(one))
        _compile(one, base, preset)
        logging.info("%s: %s", _name(one), one.status)
        if one.status.startswith("does not fit"):
            _drop_larger(candidates, one)
        elif best is None or one.planned_speed > best.planned_speed:
            best = one
    return Fit(candidates, best)


def _candidates(config: TrainConfig, preset: Preset) -> list[Candidate]:
    keys = flatten(config)
    remats = [f"{key}={value}" for key, values in _REMAT.items() if key in keys for value in values]
    if _REMAT_FLAG in keys:
        remats = [f"{_REMAT_FLAG}={value}" for value in ("false", "true")]
    largest = max(4.0, preset.num_chips / 8)
    scales = [2.0**power for power in range(-1, int(math.log2(largest)) + 1)]
    made = [
        Candidate(scale, remat, mesh)
        for mesh in candidate_meshes(preset)
        for remat in remats or [""]
        for scale in scales
    ]
    return [one for one in made if _divides(config, one, preset)]


def _shape(one: Candidate, preset: Preset) -> tuple[int, int, int]:
    return preset_shape(find_preset(preset.name), one.mesh, preset.num_chips, preset.num_chips)


def _divides(config: TrainConfig, one: Candidate, preset: Preset) -> bool:
    data, fsdp, _ = _shape(one, preset)
    rows = config.data.batch_rows if config.task == "text_speech_lm" else config.data.batch_multiple
    return rows * one.scale % (data * fsdp) == 0


def _config(base: TrainConfig, one: Candidate) -> TrainConfig:
    config = override(base, [one.remat] if one.remat else [])
    return dataclasses.replace(scale_batch(config, one.scale), mesh=one.mesh)


def _estimate(base: TrainConfig, preset: Preset, candidates: list[Candidate]) -> list[Candidate]:
    """Candidates with estimates, the fastest first, without those that cannot fit; one trace for each way to rematerialise."""
    traces: dict[str, tuple[Candidate, Traced]] = {}
    for one in candidates:
        if one.remat not in traces:
            logging.info("tracing %s", one.remat or base.name)
            config = _config(base, one)
            with open_task(config) as task:
                traces[one.remat] = one, trace_step(config, task, preset)
    # Of a batch of scale 1, on all chips together: with everything rematerialised little but the inputs of layers.
    least = min(_saved(traced) / of.scale for of, traced in traces.values())
    kept = []
    for one in candidates:
        traced_of, traced = traces[one.remat]
        _estimate_one(one, traced, one.scale / traced_of.scale, preset, least * one.scale)
        if one.gib * 2**30 <= chip_of(preset).hbm_bytes:
            kept.append(one)
    return sorted(kept, key=lambda one: -one.speed)


def _saved(traced: Traced) -> float:
    return traced.saved * num_batch_shards(traced.mesh)


def _estimate_one(one: Candidate, traced: Traced, scale: float, preset: Preset, layer_inputs: float) -> None:
    """Memory: state, gradients and half of what is kept. Time: arithmetic; what is read and written of those.

    And what is sent: gathers and sums of parameters in fp32, with a tensor axis four sums of each layer's input too.
    """
    chip, chips = chip_of(preset), preset.num_chips
    data, fsdp, tensor = _shape(one, preset)
    split = fsdp * tensor
    params, optimizer = traced.num_parameters * 4.0, sum(_state_bytes(traced))
    kept = _saved(traced) * scale / (data * fsdp)
    one.gib = ((optimizer + params) / split + _ACTIVATIONS * kept / tensor) / 2**30
    arithmetic = traced.work.flops * scale / chips / chip.peak_flops
    near = chip.link_bandwidth * max(chip.torus_axes, 1)
    inside = 3 * params / tensor * (fsdp - 1) / fsdp  # two gathers and a sum
    inside += 4 * 2 * layer_inputs / (data * fsdp) * (tensor - 1) / tensor
    data_inside = data // preset.num_slices
    inside += 2 * params / split * (data_inside - 1) / max(data_inside, 1)
    between = 2 * params / (split * data_inside) * (preset.num_slices - 1) / preset.num_slices
    memory = (2 * optimizer / split + 3 * _ACTIVATIONS * kept) / chip.hbm_bandwidth
    one.seconds = max(arithmetic, inside / near, between / chip.dcn_bandwidth_per_chip, memory)
    one.speed = batch_of(traced)[2] * scale / one.seconds


def _state_bytes(traced: Traced) -> list[float]:
    state = (traced.abstract.params, traced.abstract.opt_state)
    return [float(leaf.size * leaf.dtype.itemsize) for leaf in jax.tree.leaves(state)]


def _compile(one: Candidate, base: TrainConfig, preset: Preset) -> None:
    config = _config(base, one)
    try:
        with open_task(config) as task:
            traced = trace_step(config, task, preset)
            try:
                one.report = describe(traced, compile_step(traced))
                total = one.report["memory"]["total"] / 2**30
                one.status = f"fits: {total:.2f} GiB, {one.planned_speed:,.0f}/s"
            except DoesNotFit as failure:
                one.report = describe(traced, None, failure)
                one.status = f"does not fit: {failure}"
    except (UserError, ValueError) as error:
        one.status = f"refused: {str(error)[:100]}"


def _drop_larger(candidates: list[Candidate], failed: Candidate) -> None:
    """Of the same mesh and rematerialisation a larger batch fits no better."""
    for one in candidates:
        same = (one.remat, one.mesh) == (failed.remat, failed.mesh)
        if one.status == "not compiled" and same and one.scale >= failed.scale:
            one.status = "dropped: a smaller batch does not fit"


def _name(one: Candidate) -> str:
    return f"batch x {one.scale:g}, {one.remat or 'no choice of remat'}, {one.mesh.rules} tensor={one.mesh.tensor}"


def flags_of(one: Candidate) -> str:
    """The flags of `cv2jax train` for a candidate."""
    return " ".join(
        filter(None, [one.remat and f"--set {one.remat}", mesh_flags(one.mesh), one.report.get("batch_flags")])
    )


def table(found: Fit) -> str:
    """What was considered, as Markdown: estimates, and what became of it; of what was not compiled the first few."""
    head = ("batch", "rematerialisation", "mesh", "GiB, estimated", "ms, estimated", "result")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    tried = [one for one in found.candidates if one.status != "not compiled"]
    rest = [one for one in found.candidates if one.status == "not compiled"]
    for one in [*tried, *rest[:5]]:
        mesh = f"{one.mesh.rules}, tensor {one.mesh.tensor}"
        mark = "**" if one is found.best else ""
        cells = (f"x {one.scale:g}", one.remat or "-", mesh, f"{one.gib:.1f}", f"{one.seconds * 1e3:.0f}")
        lines.append("| " + " | ".join((*cells, f"{mark}{one.status}{mark}")) + " |")
    return "\n".join(lines)
