"""The runtime on a program that adds: y = parameter · x + what its state has counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from cv2jax.config import UserError
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis.bundle_programs import Leaf, Programs, require_calling_convention
from cv2jax.synthesis.stages import NON_FINITE, OK, RUNNING

STAGE = "adder"
TABLE = [
    Leaf("count", (2,), "float32", 0, resets=True),
    Leaf("keys", (2, 4), "float32", 0, may_stay=True),
    Leaf("positions", (2, 4), "int32", -1),
]
LARGER = [leaf if leaf.name == "count" else leaf._replace(shape=(2, 6)) for leaf in TABLE]


def add(parameters, state, inputs):
    y = parameters["scale"] * inputs["x"] + state["count"]
    return state | {"count": y}, {"y": y}


@pytest.fixture(scope="module")
def serialised():
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    state = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in TABLE}
    make = export.export(jax.jit(add), platforms=("cpu", "cuda", "tpu"))
    return bytes(make({"scale": shape()}, state, {"x": shape(2)}).serialize())


@pytest.fixture
def place(tmp_path, serialised):
    (tmp_path / files.PROGRAMS).mkdir()
    (tmp_path / files.PARAMETERS).mkdir()
    (tmp_path / files.PROGRAMS / "adder.add.stablehlo").write_bytes(serialised)
    files.write_arrays(tmp_path / files.PARAMETERS / f"{STAGE}.safetensors", [("scale", np.array(3, np.float32))])
    return tmp_path


def make_manifest(place, **changes):
    program = {"name": "adder.add", "file": "adder.add.stablehlo", "platforms": ["cpu", "cuda"], "uses_up_state": True}
    return {
        "platforms": ["cpu", "cuda"],
        "calling_convention": export.maximum_supported_calling_convention_version,
        "versions": {"jax": "0.10.2"},
        "programs": [program],
        "states": {STAGE: {"s4": [leaf._asdict() for leaf in TABLE], "s6": [leaf._asdict() for leaf in LARGER]}},
        "files": files.describe_files(place),
    } | changes


def test_a_program_runs_with_its_parameters_and_its_state(place):
    programs = Programs(place, make_manifest(place))
    assert programs.names == ["adder.add"]
    state = programs.init_state(STAGE, "s4")
    assert programs.bucket(STAGE, state) == "s4"
    np.testing.assert_array_equal(state["positions"], np.full((2, 4), -1))
    for wanted in ([3, 6], [6, 12]):
        before, (state, made) = state, programs(STAGE, "add", state, {"x": np.array([1, 2], np.float32)})
        np.testing.assert_array_equal(made["y"], wanted)
        assert before["keys"].is_deleted()  # the state is used up


def test_states_grow_are_refilled_and_reset(place):
    programs = Programs(place, make_manifest(place))
    state = programs.init_state(STAGE, "s4")
    state = state | {"positions": jnp.arange(8).reshape(2, 4), "keys": jnp.ones((2, 4)), "count": jnp.array([5.0, 6])}
    larger = programs.grow(STAGE, state, "s6")
    assert programs.bucket(STAGE, larger) == "s6"
    np.testing.assert_array_equal(larger["positions"], [[0, 1, 2, 3, -1, -1], [4, 5, 6, 7, -1, -1]])
    used = larger | {"keys": jnp.full((2, 6), 9.0)}
    refilled = programs.refill(STAGE, used, state)
    np.testing.assert_array_equal(refilled["keys"], [[1, 1, 1, 1, 9, 9]] * 2)  # behind its positions nothing counts
    np.testing.assert_array_equal(refilled["positions"], [[0, 1, 2, 3, -1, -1], [4, 5, 6, 7, -1, -1]])
    assert used["keys"].is_deleted()
    assert not state["keys"].is_deleted()
    assert not state["count"].is_deleted()
    emptied = programs.reset(STAGE, state, np.array([True, False]))
    np.testing.assert_array_equal(emptied["count"], [0, 6])
    np.testing.assert_array_equal(emptied["positions"], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_a_slot_that_is_not_finite_is_cleared_with_its_caches(place):
    table = [
        Leaf("keys", (3, 4), "float32", 0),
        Leaf("logits", (3, 2), "float32", 0),
        Leaf("status", (3,), "int32", 0, True),
    ]
    manifest = make_manifest(place, states={STAGE: {"s4": [leaf._asdict() for leaf in table]}})
    programs = Programs(place, manifest)
    state = {
        "keys": jnp.full((3, 4), 7.0).at[0, 1].set(jnp.nan),
        "logits": jnp.ones((3, 2)).at[0, 1].set(jnp.nan),
        "status": jnp.array([RUNNING, NON_FINITE, OK]),
    }
    emptied = programs.reset(STAGE, state, np.array([True, True, True]))
    np.testing.assert_array_equal(emptied["keys"], [[0] * 4, [0] * 4, [7] * 4])
    np.testing.assert_array_equal(emptied["logits"], [[0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(emptied["status"], [0, 0, 0])


def test_what_a_bundle_lacks_is_named_with_the_mend(place):
    programs = Programs(place, make_manifest(place))
    with pytest.raises(UserError, match="adder has no programs of size s9, only s4, s6"):
        programs.init_state(STAGE, "s9")
    with pytest.raises(UserError, match=r"has no program adder\.subtract for cpu; .*--from_bundle"):
        programs(STAGE, "subtract", {}, {})
    with pytest.raises(UserError, match=r"has programs for cuda, tpu, this device is a cpu; .*--platforms cpu"):
        Programs(place, make_manifest(place, platforms=["cuda", "tpu"]))


@pytest.mark.parametrize(("change", "age"), [(1, "new"), (-1, "old")])
def test_programs_of_another_age_are_refused_with_the_jax_that_wrote_them(place, change, age):
    ends = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    manifest = make_manifest(place, calling_convention=ends[change > 0] + change)
    with pytest.raises(UserError, match=rf"too {age} for jax .* written by jax 0.10.2: .*--from_bundle"):
        require_calling_convention(place, manifest)
    with pytest.raises(UserError, match=f"too {age}"):
        Programs(place, manifest)


def aged(serialised):
    """The program in a StableHLO that nobody reads any more; what it is wrapped in is whole."""
    old = b"ML\xefRStableHLO_v0.0.1\0" + bytes(50)
    return bytes(dataclasses.replace(export.deserialize(bytearray(serialised)), mlir_module_serialized=old).serialize())


def test_a_program_whose_stablehlo_has_aged_is_refused(place, serialised):
    data = aged(serialised)
    export.deserialize(bytearray(data))  # does not look
    (place / files.PROGRAMS / "adder.add.stablehlo").write_bytes(data)
    programs = Programs(place, make_manifest(place))
    with pytest.raises(UserError, match=r"cannot read it \(.*\); jax 0\.10\.2 wrote it: .*--from_bundle") as error:
        programs(STAGE, "add", programs.init_state(STAGE, "s4"), {"x": np.zeros(2, np.float32)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"nonsense" * 100])
def test_a_program_that_cannot_be_read_is_refused(place, data):
    (place / files.PROGRAMS / "adder.add.stablehlo").write_bytes(data)
    programs = Programs(place, make_manifest(place))
    with pytest.raises(UserError, match=r"cannot read it .* jax 0\.10\.2 wrote it"):
        programs(STAGE, "add", programs.init_state(STAGE, "s4"), {"x": np.zeros(2, np.float32)})
