"""`cv2jax plan` without its compiler: stand-ins, reports, mistakes in a line, the search and the matrix's bookkeeping."""

import json

import jax
import pytest

from cv2jax.cli import main as cli
from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.jobs import plan, plan_compile, plan_fit, plan_matrix
from cv2jax.jobs.plan_compile import choose_mesh, for_tpus, parse_out_of_memory, scale_batch
from cv2jax.jobs.plan_fit import Candidate, Fit, flags_of, search, table
from cv2jax.jobs.plan_report import in_words, markdown
from cv2jax.jobs.plan_standin import make_stand_in_task
from cv2jax.parallel.presets import find_preset, mesh_flags, parse_topology

GIB = 2**30


def report(**changes):
    made = {
        "stage": "lm",
        "task": "text_speech_lm",
        "machine": "v5e-16",
        "chips": 16,
        "slices": 1,
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "rules": "hybrid",
        "rows": 256,
        "shape_number": [1, 1],
        "batch": 524288.0,
        "unit": "positions",
        "parameters": 5e8,
        "bytes_a_chip": {"parameters": GIB, "optimizer": 2 * GIB, "activations": GIB, "available": 16 * GIB},
        "model_flops": 3e15,
        "traced_flops": 4e15,
        "whole_share": 0.5,
        "fits": True,
        "versions": plan_compile.versions(),
        "memory": {"arguments": 3 * GIB, "temporaries": 5 * GIB, "total": 8 * GIB},
        "flops_a_chip": 2.5e14,
        "recomputed_share": 0.25,
        "model_flops_a_chip": 1.875e14,
        "hbm_bytes_a_chip": 5e11,
        "hbm_bytes_by_place": {"blocks/mlp/gate": 4e11},
        "ici_bytes_a_chip": 6e9,
        "dcn_bytes_a_chip": 0.0,
        "intensity": 500.0,
        "balance": 240.0,
        "seconds": {"compute": 1.27, "memory": 0.61, "ici": 0.03, "dcn": 0.0, "step": 1.27},
        "bound_by": "compute",
        "utilisation": 0.75,
        "speed": 412825.0,
        "compile_seconds": 90.0,
        "not_counted": [],
        "weak_points": "bound by its arithmetic",
    }
    return made | changes


@pytest.mark.parametrize(
    "stage", ["speech_tokenizer", "text_speech_lm", "flow_matching", "hift_vocoder", "speaker_encoder"]
)
def test_a_stand_in_gives_every_stage_its_shapes(stage, tmp_path):
    config = load_config(f"{stage}_tiny")
    task = make_stand_in_task(config, tmp_path)
    specs = task.batch_specs()
    sizes = {next(iter(spec.values())).shape[0] for spec in specs}
    if stage == "text_speech_lm":
        assert sizes == {config.data.batch_rows}
    else:
        assert len(specs) <= config.data.num_buckets
        assert all(size % config.data.batch_multiple == 0 for size in sizes)
        seconds = max(spec["waveform"].shape[1] for spec in specs) / 24_000
        assert config.data.max_seconds - 0.1 < seconds <= config.data.max_seconds + 0.1
    assert jax.tree.leaves(jax.eval_shape(task.init_state, jax.random.key(0)))


def test_a_batch_is_scaled_whole():
    lm, flow = load_config("text_speech_lm_official"), load_config("flow_matching_official")
    assert scale_batch(lm, 16.0).data.batch_rows == 16 * lm.data.batch_rows
    scaled = scale_batch(flow, 16.0).data
    assert (scaled.batch_seconds, scaled.batch_multiple) == (
        16 * flow.data.batch_seconds,
        16 * flow.data.batch_multiple,
    )
    with pytest.raises(UserError, match=r"--batch_scale 0.001: data.batch_rows=256 would be 0.256 rows"):
        scale_batch(lm, 0.001)


def test_an_open_mesh_is_the_machine_s(tmp_path):
    machine, config = find_preset("v5e-16"), for_tpus(load_config("text_speech_lm_tiny"))
    assert config.compute_dtype == "bfloat16"
    task = make_stand_in_task(config, tmp_path)
    # Tiny: whole on every chip.
    assert choose_mesh(config, task, machine).mesh == MeshConfig(preset="v5e-16", rules="replicated")
    chosen = override(config, ["mesh.fsdp=4"])
    assert choose_mesh(chosen, task, machine) == chosen


def test_what_the_compiler_says_of_too_little_memory():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile error. Ran out of memory in memory space hbm. Used 127.50G of 15.75G hbm."
    )
    failure = parse_out_of_memory(text)
    assert (failure.needed, failure.available) == (127.5 * GIB, 15.75 * GIB)
    assert str(failure) == "needs 127.50 GiB a chip of 15.75 GiB"
    assert parse_out_of_memory("RESOURCE_EXHAUSTED: no more").needed == 0


def test_words_and_tables():
    fits, not_fit = report(), report(fits=False, needed=20 * GIB, usable=15.75 * GIB, weak_points="does not fit")
    text = in_words(fits)
    assert "16 chips, data=1 fsdp=16 tensor=1" in text
    assert "8.00 GiB a chip of 16.00 GiB" in text
    assert "most bytes  blocks/mlp/gate 400.0 GB" in text
    assert "75.0% of the peak rate, 412,825 positions a second" in text
    lines = markdown([fits, not_fit]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 8.00 | 16 | 250.00 | 187.50 | 500.00 | 6.00 | 0.00 | 1270.0 |" in lines[2]
    assert "**20.0**" in lines[3]
    assert "does not fit" in lines[3]


def test_the_flags_of_a_mesh():
    assert mesh_flags(MeshConfig()) == ""
    assert mesh_flags(MeshConfig(preset="v5e-16", rules="hybrid")) == "--set mesh.preset=v5e-16 --set mesh.rules=hybrid"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["text_speech_lm_tiny"], "--topology is missing"),
        (["--topology", "v5e:4x4"], "expected a CONFIG"),
        (["text_speech_lm_tiny", "--topology", "v5e:3x3"], "no such slice of v5e"),
        (["text_speech_lm_tiny", "--topology", "v5x:4x4"], "no TPU is called v5x"),
        (["--matrix"], "--matrix plans all official stages"),
        (["text_speech_lm_tinny", "--topology", "v5e:4x4"], "did you mean 'text_speech_lm_tiny'"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert cli.run(["plan", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_the_compiler_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(plan_compile.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["plan", "text_speech_lm_tiny", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'cv2jax[aot]'" in capsys.readouterr().err


def test_a_step_that_does_not_fit_has_an_exit_code_and_mends(monkeypatch, capsys, tmp_path):
    failed = report(
        fits=False, needed=20 * GIB, usable=15.75 * GIB, rules="replicated", weak_points="does not fit (needs…)"
    )
    monkeypatch.setattr(plan, "plan_stage", lambda config, preset: failed)
    monkeypatch.setattr(plan, "require_libtpu", lambda: None)
    out = tmp_path / "plan.json"
    assert cli.run(["plan", "text_speech_lm_tiny", "--topology", "v5e:2x2", "--json", str(out)]) == 4
    assert "mesh.rules=hybrid" in capsys.readouterr().out
    assert json.loads(out.read_text())[0]["needed"] == 20 * GIB


def test_of_several_each_mistake_is_told_and_the_others_are_planned(monkeypatch, capsys, tmp_path):
    def one(config, preset):
        if config.name.startswith("flow"):
            raise UserError("its batch does not divide")
        return report(stage=config.name)

    monkeypatch.setattr(plan, "plan_stage", one)
    monkeypatch.setattr(plan, "require_libtpu", lambda: None)
    out = tmp_path / "plan.md"
    assert cli.run(["plan", "all", "--topology", "v5e:4x4", "--markdown", str(out)]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == "flow_matching_official: its batch does not divide"
    assert "1 of 5 not planned" in last
    assert len(out.read_text().splitlines()) == 2 + 4


def test_a_file_that_cannot_be_written_is_told_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "require_libtpu", lambda: None)
    assert cli.run(["plan", "all", "--topology", "v5e:4x4", "--json", str(tmp_path / "no" / "a.json")]) == 2
    assert "a.json: cannot write (No such file" in capsys.readouterr().err


def fake_search(monkeypatch, outcome):
    """A search whose estimates say what is given, without a trace or a compilation: `outcome(candidate)` → report."""
    compiled = []

    def estimate(base, preset, candidates):
        for one in candidates:
            one.speed, one.gib, one.seconds = 100 * one.scale - one.mesh.tensor, 4 * one.scale, 1.0
        return sorted(candidates, key=lambda one: -one.speed)

    def compile_one(one, base, preset):
        compiled.append(one)
        one.report = outcome(one)
        one.status = "fits" if one.report["fits"] else "does not fit: too large"

    monkeypatch.setattr(plan_fit, "_estimate", estimate)
    monkeypatch.setattr(plan_fit, "_compile", compile_one)
    return compiled


def test_the_search_compiles_the_most_promising_and_no_more_than_it_may(monkeypatch):
    config, machine = load_config("text_speech_lm_tiny"), parse_topology("v5e:2x2")
    compiled = fake_search(monkeypatch, lambda one: report(fits=one.scale < 4, speed=90.0 * one.scale))
    found = search(config, machine, 20)
    assert found.best is not None
    assert found.best.scale == 2
    assert compiled[0].scale == 4
    # Each mesh and remat fails once at most, and what is slower by its estimate than the best is not compiled.
    failed = [(one.mesh, one.remat) for one in compiled if one.scale == 4]
    assert len(set(failed)) == len(failed)
    assert all(one.speed > found.best.planned_speed for one in compiled)
    assert "fits" in table(found)
    compiled.clear()
    search(config, machine, 2)
    assert len(compiled) == 2


def test_the_flags_of_a_candidate():
    one = Candidate(2.0, "model.remat=full", MeshConfig(preset="v5e-16", rules="hybrid"))
    one.report = report(batch_flags="--set data.batch_rows=512")
    flags = "--set model.remat=full --set mesh.preset=v5e-16 --set mesh.rules=hybrid --set data.batch_rows=512"
    assert flags_of(one) == flags


def test_nothing_that_fits_is_told(monkeypatch, capsys):
    monkeypatch.setattr(
        plan, "search", lambda *args: Fit([Candidate(1.0, "", MeshConfig(), status="does not fit")], None)
    )
    monkeypatch.setattr(plan, "require_libtpu", lambda: None)
    assert cli.run(["plan", "text_speech_lm_tiny", "--topology", "v5e:2x2", "--fit"]) == 2
    assert "nothing that was tried fits v5e-4" in capsys.readouterr().err


def test_a_matrix_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    made, broken = [], {("flow_matching", "v5e-256")}

    def make(cell, file):
        if (cell.stage, cell.machine) in broken:
            return None
        made.append(cell)
        one = report(task=cell.stage, stage=cell.stage, machine=cell.machine)
        file.write_text(json.dumps([one]))
        return one

    monkeypatch.setattr(plan_matrix, "_plan", make)
    with pytest.raises(UserError, match=r"1 cells gave no report.*flow_matching on v5e-256"):
        plan_matrix.run(tmp_path)
    assert len(made) == 24
    made.clear()
    broken.clear()
    old = tmp_path / "text_speech_lm.v5e-16.json"
    old.write_text(old.read_text().replace(plan_compile.versions()["libtpu"], "0.0.1"))
    assert plan_matrix.run(tmp_path)
    assert {(cell.stage, cell.machine) for cell in made} == {("flow_matching", "v5e-256"), ("text_speech_lm", "v5e-16")}
    assert len(json.loads((tmp_path / "matrix.json").read_text())) == 25
    text = (tmp_path / "matrix.md").read_text()
    assert "| text_speech_lm | 250.00 → 250.00 |" in text
    assert f"libtpu {plan_compile.versions()['libtpu']}" in text


def test_cells_keep_the_batch_of_a_chip():
    by_machine = {cell.machine: cell for cell in plan_matrix.cells()}
    assert {name: cell.scale for name, cell in by_machine.items()} == {
        "v5e-16": 1,
        "v5e-256": 16,
        "v5p-128": 4,
        "v6e-256": 16,
        "2xv5e-256": 32,
    }
