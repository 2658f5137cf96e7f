"""`cv2jax plan`: stages on machines that are not here, one after the other; reports on stdout and in files."""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import logging

from cv2jax.config import TrainConfig, UserError, load_config, override
from cv2jax.jobs import plan_matrix as matrix
from cv2jax.jobs.plan_compile import (
    DoesNotFit,
    choose_mesh,
    compile_step,
    for_tpus,
    open_task,
    require_libtpu,
    scale_batch,
    trace_step,
)
from cv2jax.jobs.plan_fit import Fit, flags_of, search, table
from cv2jax.jobs.plan_report import Report, describe, in_words, markdown
from cv2jax.parallel.presets import Preset, parse_topology


def load_stages(names: Sequence[str], assignments: Sequence[str]) -> list[TrainConfig]:
    """The configs of these names, of the official stages for "all", each with the assignments."""
    found = [f"{stage}_official" for stage in matrix.STAGES] if list(names) == ["all"] else names
    return [override(load_config(name), assignments) for name in found]


def plan(
    configs: Sequence[TrainConfig],
    topology: str,
    *,
    num_slices: int = 1,
    batch_scale: float = 1.0,
    fit: int = 0,
    json_file: str | None = None,
    markdown_file: str | None = None,
) -> bool:
    """Plans each config on a topology, prints the reports and writes them as they come; whether all of them fit.

    With `fit` each is searched for its fastest plan in so many compilations. UserError for a mistake; of several configs
    each is told, and the others are planned.
    """
    preset = parse_topology(topology, num_slices)
    require_libtpu()
    reports, mistakes = [], []
    _write(reports, json_file, markdown_file)  # before minutes of work, that they can be
    for config in configs:
        try:
            config = scale_batch(config, batch_scale)
            report = _search(config, preset, fit) if fit else plan_stage(config, preset)
        except UserError as error:
            mistakes.append(error)
            if len(configs) > 1:
                print(f"{config.name}: {error}", file=sys.stderr)
            continue
        print(in_words(report), flush=True)
        if not report["fits"]:
            print(f"  try         {mends(report)}", flush=True)
        reports.append(report)
        _write(reports, json_file, markdown_file)
    if mistakes:
        raise (
            mistakes[0] if len(configs) == 1 else UserError(f"{len(mistakes)} of {len(configs)} not planned, see above")
        )
    return all(report["fits"] for report in reports)


def plan_stage(config: TrainConfig, preset: Preset) -> Report:
    """The report of one stage on one machine."""
    config = for_tpus(config)
    with open_task(config) as task:
        traced = trace_step(choose_mesh(config, task, preset), task, preset)
        logging.info("compiling %s for %s", config.name, preset.name)
        try:
            return describe(traced, compile_step(traced))
        except DoesNotFit as failure:
            return describe(traced, None, failure)


def _search(config: TrainConfig, preset: Preset, compilations: int) -> Report:
    found: Fit = search(config, preset, compilations)
    print(table(found), flush=True)
    if found.best is None:
        raise UserError(f"{config.name}: nothing that was tried fits {preset.name}; give more chips, or --compilations")
    print(f"use: {flags_of(found.best)}", flush=True)
    return found.best.report


def mends(report: Report) -> str:
    """What makes a step smaller, for one that does not fit."""
    tries = ["--fit", "a smaller --batch_scale"]
    if report["rules"] == "replicated":
        tries.insert(1, "--set mesh.preset=" + report["machine"] + " --set mesh.rules=hybrid")
    if report["traced_flops"] <= 1.01 * report["model_flops"]:
        tries.append("--set model.remat=full (language model: model.backbone.remat)")
    return ", ".join(tries)


def plan_matrix(out: pathlib.Path) -> bool:
    """`plan_matrix.run`: every official stage on every machine; whether all of them fit."""
    require_libtpu()
    return matrix.run(out)


def _write(reports: list[Report], json_file: str | None, markdown_file: str | None) -> None:
    texts = {json_file: json.dumps(reports, indent=1), markdown_file: markdown(reports)}
    for path, text in texts.items():
        try:
            if path is not None:
                pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror}); give another file") from error
