"""What a plan says: one dictionary a stage and machine, as JSON, as Markdown rows and in words."""

from typing import Any

from cv2jax.config import TrainConfig
from cv2jax.jobs.plan_compile import Compiled, DoesNotFit, Traced, versions
from cv2jax.parallel.presets import chip_of, mesh_flags

Report = dict[str, Any]
GIB = 2**30
COLUMNS = (
    *(
        "stage",
        "machine",
        "mesh",
        "batch a chip",
        "GiB a chip",
        "of",
        "TFLOP a chip",
        "model",
        "HBM GB",
        "ICI GB",
        "DCN GB",
    ),
    *("compute ms", "HBM ms", "ICI ms", "DCN ms", "step ms", "utilisation", "speed", "bound by"),
)
_BOUND = {
    "compute": "its arithmetic",
    "memory": "its memory's bandwidth",
    "ici": "the interconnect",
    "dcn": "the network between slices",
}
_PLACES = 12  # that move the most, in a report; the first few are told
_WHOLE = 0.05  # share of parameters that stay whole from which it is told


def describe(traced: Traced, compiled: Compiled | None, failure: DoesNotFit | None = None) -> Report:
    """The report of a stage on a machine; of a step that does not fit without what only a compiled one has."""
    chip, chips = chip_of(traced.preset), traced.mesh.size
    rows, unit, amount = batch_of(traced)
    report: Report = {
        "stage": traced.config.name,
        "task": traced.config.task,
        "machine": traced.preset.name,
        "chips": chips,
        "slices": traced.preset.num_slices,
        "mesh": {name: int(size) for name, size in traced.mesh.shape.items()},
        "rules": traced.config.mesh.rules,
        "flags": mesh_flags(traced.config.mesh),
        "batch_flags": _batch_flags(traced.config),
        "rows": rows,
        "shape": {name: list(spec.shape) for name, spec in traced.specs.items()},
        "shape_number": list(traced.shape_of),
        "batch": amount,
        "unit": unit,
        "parameters": traced.num_parameters,
        "bytes_a_chip": {
            "parameters": traced.param_bytes,
            "optimizer": traced.optimizer_bytes,
            "activations": traced.saved,
            "available": chip.hbm_bytes,
        },
        "model_flops": traced.work.model_flops,
        "traced_flops": traced.work.flops,
        "whole_share": traced.whole_share,
        "fits": compiled is not None,
        "versions": versions(),
    }
    if failure is not None:
        report["needed"], report["usable"] = failure.needed, failure.available
    if compiled is not None:
        report |= _figures(traced, compiled)
    report["weak_points"] = weak_points(report)
    return report


def _figures(traced: Traced, compiled: Compiled) -> Report:
    cost, roofline, chips = compiled.cost, compiled.roofline, traced.mesh.size
    _, _, amount = batch_of(traced)
    kinds: dict[str, dict[str, float]] = {}
    for one in cost.transfers:
        kind = kinds.setdefault(one.kind, {"count": 0.0, "ici_bytes": 0.0, "dcn_bytes": 0.0})
        for name in kind:
            kind[name] += getattr(one, name)
    memory = {"arguments": compiled.arguments, "temporaries": compiled.temporaries, "total": compiled.total}
    step = roofline.step_seconds
    return {
        "memory": memory,
        "flops_a_chip": cost.flops,
        "recomputed_share": cost.recomputed / cost.flops if cost.flops else 0.0,
        "model_flops_a_chip": traced.work.model_flops / chips,
        "hbm_bytes_a_chip": cost.hbm_bytes,
        "hbm_bytes_by_place": dict(sorted(cost.by_place.items(), key=lambda item: -item[1])[:_PLACES]),
        "ici_bytes_a_chip": cost.ici_bytes,
        "dcn_bytes_a_chip": cost.dcn_bytes,
        "collectives": kinds,
        "intensity": cost.flops / cost.hbm_bytes if cost.hbm_bytes else 0.0,
        "balance": chip_of(traced.preset).peak_flops / chip_of(traced.preset).hbm_bandwidth,
        "seconds": {
            "compute": roofline.compute,
            "memory": roofline.memory,
            "ici": roofline.ici,
            "dcn": roofline.dcn,
            "step": step,
        },
        "bound_by": roofline.bound_by,
        "utilisation": roofline.utilisation,
        "speed": amount / step if step else 0.0,
        "compile_seconds": round(compiled.seconds, 1),
        "not_counted": sorted(cost.unknown),
    }


def batch_of(traced: Traced) -> tuple[int, str, float]:
    """(rows, unit, amount) of the global batch: positions of packed rows, or seconds of audio, padding included."""
    specs = traced.specs
    if "waveform" in specs:
        rows, samples = specs["waveform"].shape
        return rows, "s of audio", rows * samples / traced.rate_hz
    rows, positions = next(iter(specs.values())).shape[:2]
    return rows, "positions", float(rows * positions)


def _batch_flags(config: TrainConfig) -> str:
    names = ("batch_rows",) if config.task == "text_speech_lm" else ("batch_seconds", "batch_multiple")
    return " ".join(f"--set data.{name}={getattr(config.data, name):g}" for name in names)


def weak_points(report: Report) -> str:
    """In a line: what bounds the step, what is computed twice, what is not split, and what could not be counted."""
    if not report["fits"]:
        need = (
            f" (needs {report['needed'] / GIB:.2f} GiB of {report['usable'] / GIB:.2f})" if report.get("needed") else ""
        )
        return f"does not fit{need}"
    parts = []
    times = report["seconds"]
    second = sorted((v for k, v in times.items() if k != "step"), reverse=True)[1]
    parts.append(f"bound by {_BOUND[report['bound_by']]}, {times['step'] / second if second else 0:.1f} x the next")
    if report["bound_by"] == "memory":
        place, moved = next(iter(report["hbm_bytes_by_place"].items()))
        parts.append(f"{moved / report['hbm_bytes_a_chip']:.0%} of the bytes in {place}")
    if report["recomputed_share"] > 0.01:
        parts.append(f"{report['recomputed_share']:.0%} of the arithmetic is rematerialisation")
    if report["whole_share"] > _WHOLE:
        parts.append(f"{report['whole_share']:.0%} of the parameters do not divide and stay whole on every chip")
    if report["not_counted"]:
        parts.append(f"not counted: {', '.join(report['not_counted'][:3])}")
    return "; ".join(parts)


def in_words(report: Report) -> str:
    """The report for a terminal."""
    held, axes = report["bytes_a_chip"], " ".join(f"{name}={size}" for name, size in report["mesh"].items())
    gib = lambda value: f"{value / GIB:.2f} GiB"  # noqa: E731
    first, of = report["shape_number"]
    lines = [
        f"{report['stage']} on {report['machine']}: {report['chips']} chips, {axes}, rules {report['rules']}",
        f"  batch       {report['rows']} rows, {report['batch']:,.0f} {report['unit']} (shape {first} of {of})",
        f"  parameters  {gib(held['parameters'])} a chip of {report['parameters'] / 1e6:.1f} M; "
        f"optimizer {gib(held['optimizer'])}; activations kept {gib(held['activations'])} at most",
    ]
    if not report["fits"]:
        return "\n".join([*lines, f"  {report['weak_points']}"])
    memory, times, places = report["memory"], report["seconds"], list(report["hbm_bytes_by_place"].items())[:4]
    lines += [
        f"  memory      {gib(memory['total'])} a chip of {gib(held['available'])}: arguments {gib(memory['arguments'])}, "
        f"temporaries {gib(memory['temporaries'])}",
        f"  arithmetic  {report['flops_a_chip'] / 1e12:.3f} TFLOP a chip, {report['model_flops_a_chip'] / 1e12:.3f} the "
        f"model's; {report['intensity']:.0f} FLOP a byte of memory (the chip's balance: {report['balance']:.0f})",
        f"  moved       HBM {report['hbm_bytes_a_chip'] / 1e9:.2f} GB, ICI {report['ici_bytes_a_chip'] / 1e9:.3f} GB, "
        f"DCN {report['dcn_bytes_a_chip'] / 1e9:.3f} GB a chip",
        "  most bytes  " + ", ".join(f"{place} {moved / 1e9:.1f} GB" for place, moved in places),
        "  times       " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in times.items()),
        f"  roofline    {report['utilisation']:.1%} of the peak rate, {report['speed']:,.0f} {report['unit']} a second",
        f"  weak points {report['weak_points']}",
        f"  compiled in {report['compile_seconds']:.0f} s ({', '.join(' '.join(v) for v in report['versions'].items())})",
    ]
    return "\n".join(lines)


def markdown(reports: list[Report]) -> str:
    """A table of reports, a row each."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row(report)) + " |" for report in reports]
    return "\n".join(lines)


def row(report: Report) -> list[str]:
    """A report's cells of COLUMNS."""
    mesh = "×".join(str(size) for size in report["mesh"].values() if size > 1) or "1"
    cells = [report["stage"], report["machine"], f"{report['rules']} {mesh}"]
    cells += [f"{report['batch'] / report['chips']:,.0f} {report['unit']}"]
    available = f"{report['bytes_a_chip']['available'] / GIB:.0f}"
    if not report["fits"]:
        needed = f"**{report['needed'] / GIB:.1f}**" if report.get("needed") else "too much"
        return cells + [needed, available] + [""] * (len(COLUMNS) - 7) + ["does not fit"]
    times = report["seconds"]
    cells += [f"{report['memory']['total'] / GIB:.2f}", available]
    cells += [f"{report[name] / 1e12:.2f}" for name in ("flops_a_chip", "model_flops_a_chip")]
    cells += [f"{report[f'{name}_bytes_a_chip'] / 1e9:.2f}" for name in ("hbm", "ici", "dcn")]
    cells += [f"{times[name] * 1e3:.1f}" for name in ("compute", "memory", "ici", "dcn", "step")]
    return [*cells, f"{report['utilisation']:.0%}", f"{report['speed']:,.0f} {report['unit']}/s", report["bound_by"]]
