"""Checkpoints on disk: damage is told from another model, with the mend, and Orbax deprecates nothing that is used."""

import gc
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from cv2jax.config import UserError
from cv2jax.train import checkpoint
from cv2jax.train.checkpoint import Checkpoints, Damaged, load_subtree, save_frugally


def make_state(width: int = 300, step: int = 0):
    return {"params": {"kernel": jnp.arange(width * 40.0).reshape(width, 40)}, "step": jnp.array(step, jnp.int32)}


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
            checkpoints.save(step, make_state(step=step))
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


FILES = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "state/_METADATA",
    "state/_sharding",
    "state/commit_success.txt",
    "state/manifest.ocdbt",
    "state/array_metadatas/process_0",
    "state/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
)


def restore(directory, width: int = 300):
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore(abstract(width))


def damage(place, how):
    if how == "missing":
        place.unlink()
        return
    data = bytearray(place.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif data:
        data[len(data) // 2] ^= 0x10
    place.write_bytes(bytes(data))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("leftovers_collected")
@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        *((pattern, "cut") for pattern in FILES),
        *(pytest.param(pattern, how, marks=pytest.mark.slow) for pattern in FILES for how in ("missing", "flipped")),
    ],
)
def test_any_damage_is_harmless_or_the_one_before_serves(copy, caplog, pattern, how):
    """Whatever is restored is, bit for bit, what was saved."""
    places = list((copy / "8").glob(pattern))
    for place in places:
        damage(place, how)
    state, step = restore(copy)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step=step))
    if step == 4:
        (line,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
        assert "checkpoints/8 is damaged (" in line
        assert "going on from step 4; it is kept in" in line
        assert "\n" not in line
        assert os.listdir(copy.with_name("checkpoints-damaged")) == ["8"]
        with Checkpoints(copy, keep=2) as checkpoints:
            checkpoints.save(8, make_state())
            checkpoints.wait()
        assert restore(copy)[1] == 8
    else:
        assert step == 8
        assert not pattern.startswith("state/d") or not places


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("leftovers_collected")
def test_where_none_can_be_read_nothing_is_moved_and_the_newest_is_named(copy):
    for step in ("4", "8"):
        damage(copy / step / "state" / "manifest.ocdbt", "cut")
    with pytest.raises(
        Damaged, match=r"checkpoints/8 is damaged \(.+\), and no other can be read; give another --workdir"
    ):
        restore(copy)
    assert {"4", "8"} <= set(os.listdir(copy))
    assert not copy.with_name("checkpoints-damaged").exists()


def test_a_number_that_changed_on_the_disk_is_noticed(copy, monkeypatch):
    """As a byte that no library's checksum covers."""
    real = ocp.load_checkpointables

    def rotten(path, wanted):
        loaded = real(path, wanted)
        if str(path).endswith("8"):
            loaded["state"]["params"]["kernel"] = loaded["state"]["params"]["kernel"].at[7, 3].multiply(1 + 2**-23)
        return loaded

    monkeypatch.setattr("cv2jax.train.checkpoint.ocp.load_checkpointables", rotten)
    assert restore(copy)[1] == 4


def test_another_model_does_not_fall_back(copy):
    with pytest.raises(UserError, match="is of another model"):
        restore(copy, 20)
    assert not copy.with_name("checkpoints-damaged").exists()


def test_a_second_damage_of_one_step_is_kept_too(copy):
    copy.with_name("checkpoints-damaged").mkdir()
    (copy.with_name("checkpoints-damaged") / "8").mkdir()
    with Checkpoints(copy, keep=2) as checkpoints:
        checkpoints._set_aside([8])
        assert checkpoints.latest_step == 4
    assert sorted(os.listdir(copy.with_name("checkpoints-damaged"))) == ["8", "8.2"]


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def test_a_checkpoint_of_before_there_were_hashes_loads(tmp_path):
    save_frugally(tmp_path / "checkpoints", 3, jax.tree.map(np.asarray, make_state()))
    assert restore(tmp_path / "checkpoints")[1] == 3


def test_full_memory_and_an_interrupt_are_not_damage(saved, monkeypatch):
    for cause in (KeyboardInterrupt(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")):

        def wrapped(*args, cause=cause):
            raise KeyError("incompatible handler") from cause

        with Checkpoints(saved, keep=2) as checkpoints:
            monkeypatch.setattr("cv2jax.train.checkpoint.ocp.load_checkpointables", wrapped)
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
    seen, load = [], ocp.load_checkpointables

    def watched(place, wanted):
        seen.append([leaf.shape[0] for leaf in jax.tree.leaves(wanted)])
        return load(place, wanted)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", watched)
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in state.items()}
    loaded = load_subtree(tmp_path / "checkpoints", {"params": (wanted, None)})
    assert sorted(map(sorted, seen)) == [[1, 3], [7, 12], [30]]
    assert loaded["params"][1] is None
    for name, array in state.items():
        np.testing.assert_array_equal(loaded["params"][0][name], array)
