"""Checkpoints on disk: damage is told from another model, with the mend, and Orbax deprecates nothing that is used."""

import gc
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.train import checkpoint
from cv2jax.train.checkpoint import Checkpoints, load_subtree, save_frugally


def make_state(width: int = 300):
    return {"params": {"kernel": jnp.arange(width * 40.0).reshape(width, 40)}, "step": jnp.zeros((), jnp.int32)}


def abstract(width: int = 300):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make_state(width))


def load_all(directory, width: int = 300):
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.load(abstract(width))


def load_part(directory, width: int = 300):
    return load_subtree(directory, {"params": abstract(width)["params"]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, make_state())
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture
def leftovers_collected():
    """Waits for, and collects, what Orbax leaves behind, before it can speak up in the middle of another test."""
    yield
    time.sleep(0.2)
    gc.collect()


# At the first read that fails Orbax closes its event loop under the others: what they say then reaches nobody but pytest.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("leftovers_collected")
@pytest.mark.parametrize("load", [load_all, load_part])
@pytest.mark.parametrize("pattern", ["state/_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0/d/*", "state"])
def test_a_damaged_checkpoint_names_its_folder_and_the_one_before_serves(copy, load, pattern):
    for path in list((copy / "8").glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"checkpoints/8 is damaged \(.+\); remove that folder .* the one before"
    ) as got:
        load(copy)
    assert "\n" not in str(got.value)
    shutil.rmtree(copy / "8")
    np.testing.assert_array_equal(load(copy)["params"]["kernel"], make_state()["params"]["kernel"])


def test_a_path_that_is_no_utf8_is_no_damage(tmp_path):
    place = tmp_path / os.fsdecode(b"\xff")
    for use in (load_all, load_part, lambda directory: save_frugally(directory, 0, {})):
        with pytest.raises(UserError, match="Orbax takes no path with bytes that are not UTF-8; rename it"):
            use(place)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("load", [load_all, load_part])
def test_another_model_is_not_damage(saved, load):
    with pytest.raises(UserError, match=r"of another model: params/kernel: model \(20, 40\), checkpoint \(300, 40\)"):
        load(saved, 20)


def test_loading_a_part_uses_nothing_deprecated(saved, caplog):
    load_part(saved)
    assert "deprecated" not in caplog.text


def test_full_memory_and_an_interrupt_are_not_damage(saved, monkeypatch):
    for cause in (KeyboardInterrupt(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")):

        def wrapped(*args, cause=cause):
            raise KeyError("incompatible handler") from cause

        with Checkpoints(saved, keep=2) as checkpoints:
            monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", wrapped)
            with pytest.raises(type(cause)):
                checkpoints.load(abstract())


def test_what_is_saved_frugally_loads_in_part_and_sharded(tmp_path, caplog):
    state = jax.tree.map(np.asarray, make_state(64))
    save_frugally(tmp_path / "checkpoints", 0, state)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    wanted = {"params": {"kernel": jax.ShapeDtypeStruct((64, 40), np.float32, sharding=sharding)}}
    loaded = load_subtree(tmp_path / "checkpoints", wanted)
    assert loaded["params"]["kernel"].sharding == sharding
    np.testing.assert_array_equal(loaded["params"]["kernel"], state["params"]["kernel"])
    with pytest.raises(UserError, match="is of another model"):
        load_part(tmp_path / "checkpoints", 65)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step == 0


def test_a_part_is_read_in_pieces_that_fit_the_bound(tmp_path, monkeypatch):
    sizes = {"a": 7, "b": 30, "c": 12, "d": 3, "e": 1}
    state = {name: jnp.arange(float(size)) + size for name, size in sizes.items()}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, {"params": (state, {"left": jnp.ones(2)})})
    monkeypatch.setattr(checkpoint, "_READ_AT_ONCE", 4 * 20)
    seen, load = [], checkpoint.ocp.training.Checkpointer.load_checkpointables

    def watched(self, step, wanted):
        seen.append([leaf.shape[0] for leaf in jax.tree.leaves(wanted)])
        return load(self, step, wanted)

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "load_checkpointables", watched)
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in state.items()}
    loaded = load_subtree(tmp_path / "checkpoints", {"params": (wanted, None)})
    assert sorted(map(sorted, seen)) == [[1, 3], [7, 12], [30]]
    assert loaded["params"][1] is None
    for name, array in state.items():
        np.testing.assert_array_equal(loaded["params"][0][name], array)
