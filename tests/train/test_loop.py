"""The loop: exact resume, SIGTERM, skipped steps, compilations, other configs."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.train.checkpoint import Checkpoints, load_subtree
from cv2jax.train.disk import full_disk_reported
from cv2jax.train.loop import EXIT_PREEMPTED, train
from cv2jax.train.metrics import TIME_FIELDS, read_metrics
from cv2jax.train.stop import StopSignal
from tests.run_record import Killed
from tests.train.toy import SHAPES, ToyTask, toy_config


def run(workdir, config=None, **task):
    config = config or toy_config()
    return train(ToyTask(config, **task), config, workdir)


def final_state(workdir, config=None):
    config = config or toy_config()
    abstract, _ = abstract_state(ToyTask(config).init_state, make_mesh(MeshConfig()))
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.load(abstract))


def record(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    assert run(workdir) == 0
    return workdir


def test_a_run_leaves_its_record(unbroken):
    lines = record(unbroken)
    assert [x["step"] for x in lines if x["kind"] == "train"] == [3, 6, 9, 12, 15, 18, 20]
    assert [x["step"] for x in lines if x["kind"] == "evaluate"] == [5, 10, 15, 20]
    assert lines[-2]["loss"] < lines[0]["loss"]
    assert (unbroken / "curves.png").stat().st_size > 5000
    assert list((unbroken / "tensorboard").iterdir())
    assert json.loads((unbroken / "run.json").read_text())["config"]["num_steps"] == 20
    assert sorted(p.name for p in (unbroken / "checkpoints").iterdir() if p.name.isdigit()) == ["16", "20"]


@pytest.mark.parametrize("kills", [(2,), (7, 13), (16, 17), (19,)])
def test_a_killed_run_resumes_bit_for_bit(unbroken, tmp_path, kills):
    for at in kills:

        def die(step, at=at):
            if step == at:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path, on_step=die)
    assert run(tmp_path) == 0
    assert record(tmp_path) == record(unbroken)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(unbroken))


def test_sigterm_saves_and_the_same_command_goes_on(unbroken, tmp_path):
    def terminate(step):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, on_step=terminate) == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step == 11
    assert run(tmp_path) == 0
    assert record(tmp_path) == record(unbroken)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(unbroken))


def test_a_finished_run_does_nothing(unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert run(unbroken) == 0
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_step_that_is_not_finite_is_skipped_counted_and_traced(tmp_path):
    config = toy_config(num_steps=10)
    assert run(tmp_path, config, poison=4) == 0
    (line,) = [x for x in record(tmp_path) if x["kind"] == "skipped"]
    assert line["step"] == 5
    assert line["skipped_utterances"] == ["utterance-4-3"]
    state = final_state(tmp_path, config)
    assert state.num_skipped == 1
    assert state.step == 10
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_run_that_only_skips_stops_and_says_so(tmp_path):
    class Broken(ToyTask):
        def batches(self, *arguments):
            for step, size, local in super().batches(*arguments):
                yield step, size, {"x": local["x"] * np.float32("nan")}

    config = toy_config(num_steps=60, evaluate_every=60)
    with pytest.raises(UserError, match=r"50 steps in a row up to step 50 .* lower optimizer\.learning_rate"):
        train(Broken(config), config, tmp_path)


def test_a_skipped_step_between_two_lines_survives_a_kill(tmp_path):
    def die(step):
        if step == 9:
            raise Killed

    config = toy_config(num_steps=12, log_every=100)
    with pytest.raises(Killed):
        run(tmp_path, config, poison=6, on_step=die)
    assert run(tmp_path, config, poison=6) == 0
    assert [x["step"] for x in record(tmp_path) if x["kind"] == "skipped"] == [7]


def test_a_skipped_step_leaves_parameters_and_moments(tmp_path):
    config = toy_config(num_steps=5, save_every=4, keep_checkpoints=3)
    run(tmp_path, config, poison=4)
    abstract, _ = abstract_state(ToyTask(config).init_state, make_mesh(MeshConfig()))
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        before, after = checkpoints.load(abstract, 4), checkpoints.load(abstract, 5)
    for name in ("params", "opt_state", "model_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_exactly_as_many_compilations_as_batch_shapes(tmp_path, monkeypatch):
    compiled = []
    original = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, *a, **k: compiled.append(1) or original(self, *a, **k)
    )
    traces = []

    class Counting(ToyTask):
        def make_step(self):
            step = super().make_step()

            def counted(*args):
                traces.append(1)
                return step(*args)

            return counted

    config = toy_config()
    train(Counting(config), config, tmp_path)
    assert len(compiled) == len(traces) == len(SHAPES)


def test_another_config_is_refused_and_a_free_key_is_not(unbroken):
    other = toy_config(optimizer=dataclasses.replace(toy_config().optimizer, learning_rate=0.5))
    with pytest.raises(UserError, match=r"another config \(optimizer\.learning_rate: 0\.1 → 0\.5\)"):
        run(unbroken, other)
    with pytest.raises(UserError, match="data: corpus: 'one' → 'two'"):
        run(unbroken, corpus="two")
    free = {"stuck_seconds": 60.0, "profile_steps": "2:3", "expected": ("train loss 9 0 1",)}
    assert run(unbroken, toy_config(log_every=7, **free)) == 0


def test_a_checkpoint_of_another_model_lists_the_leaves(unbroken):
    abstract, _ = abstract_state(ToyTask(toy_config()).init_state, make_mesh(MeshConfig()))
    kernel = jax.ShapeDtypeStruct((3, 3), np.float32, sharding=abstract.params["layer"]["kernel"].sharding)
    wrong = abstract.replace(params={"layer": {"kernel": kernel}})
    with (
        Checkpoints(unbroken / "checkpoints", keep=2) as checkpoints,
        pytest.raises(UserError, match=r"params/layer/kernel: model \(3, 3\), checkpoint \(8, 4\)"),
    ):
        checkpoints.load(wrong)


def test_a_part_of_a_checkpoint_loads_alone(unbroken, tmp_path):
    abstract, _ = abstract_state(ToyTask(toy_config()).init_state, make_mesh(MeshConfig()))
    part = load_subtree(unbroken / "checkpoints", {"params": {"layer": {"kernel": abstract.params["layer"]["kernel"]}}})
    np.testing.assert_array_equal(part["params"]["layer"]["kernel"], final_state(unbroken).params["layer"]["kernel"])
    with pytest.raises(UserError, match="no checkpoint"):
        load_subtree(tmp_path / "none", {"params": {}})


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4, tensor=2)]
)
def test_other_meshes_resume_the_same_run(unbroken, tmp_path, mesh):
    def die(step):
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_step=die)
    assert run(tmp_path, toy_config(mesh=mesh)) == 0
    ours = [x["loss"] for x in record(tmp_path) if x["kind"] == "train"]
    theirs = [x["loss"] for x in record(unbroken) if x["kind"] == "train"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_mesh_that_does_not_divide_the_batch_is_named(tmp_path):
    class Odd(ToyTask):
        def batch_sizes(self):
            return {8, 6}

    with pytest.raises(UserError, match=r"data\.batch_multiple"):
        train(Odd(toy_config()), toy_config(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_with_a_run_at_work_is_refused(tmp_path):
    messages = []

    def intrude(step):
        if step == 1:
            with pytest.raises(UserError, match="another `cv2jax train` is at work") as caught:
                run(tmp_path, toy_config(num_steps=3))
            messages.append(str(caught.value))

    assert run(tmp_path, toy_config(num_steps=3), on_step=intrude) == 0
    assert len(messages) == 1


def test_a_place_that_cannot_lock_is_no_run_at_work(tmp_path, monkeypatch, caplog):
    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("cv2jax.train.loop.fcntl.flock", no_locks)
    with caplog.at_level("WARNING"):
        assert run(tmp_path, toy_config(num_steps=2)) == 0
    assert "cannot be locked (Function not implemented)" in caplog.text


def test_a_first_start_that_failed_binds_nobody_to_its_config(tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("cv2jax.train.loop.compile_steps", no_memory)
        with pytest.raises(MemoryError):
            run(tmp_path, toy_config(num_steps=2))
    other = toy_config(num_steps=3)
    assert run(tmp_path, other) == 0
    assert json.loads((tmp_path / "run.json").read_text())["config"]["num_steps"] == 3


def test_a_stop_before_the_first_step_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("cv2jax.train.loop.compile_steps", lambda *_: pytest.fail("compiled after a stop"))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        config = toy_config(num_steps=2)
        assert train(ToyTask(config), config, tmp_path, stop) == EXIT_PREEMPTED
    monkeypatch.undo()
    assert run(tmp_path, toy_config(num_steps=2)) == 0


@pytest.mark.parametrize("where", ["_checkpointer.save_checkpointables_async", "_checkpointer.wait"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, where):
    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing [OS error 28: ENOSPC No space left on device]")

    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        monkeypatch.setattr(getattr(checkpoints, where.split(".")[0]), where.split(".")[1], full)
        with pytest.raises(
            UserError, match=r"c: cannot write \(No space left on device\); make room and give the same"
        ):
            checkpoints.save(1, {"x": jax.numpy.zeros(2)})
        monkeypatch.undo()


def test_full_device_memory_is_not_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="out of memory"), full_disk_reported(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory")


def test_a_stop_at_an_evaluation_step_saves_first_and_evaluates_on_resume(unbroken, tmp_path):
    def terminate(step):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(tmp_path, on_step=terminate) == EXIT_PREEMPTED
    assert [x["step"] for x in record(tmp_path) if x["kind"] == "evaluate"] == [5]
    assert run(tmp_path) == 0
    assert record(tmp_path) == record(unbroken)
