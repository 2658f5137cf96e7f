"""Presets by name, and meshes by preset and rules: shapes, tables that follow the mesh, one line for each mistake."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cv2jax.config import MeshConfig, UserError, from_dict, override, validate
from cv2jax.parallel.chips import CHIPS, find_chip
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.presets import (
    SLICES,
    candidate_meshes,
    find_preset,
    parse_topology,
    preset_shape,
    suggest_rules,
)
from cv2jax.parallel.sharding import REPLICATED, RULES, abstract_state, axis_rules, constrain, map_local, rules_of


@pytest.mark.parametrize(
    ("name", "topology", "chips", "slices"),
    [
        ("v5e-16", "v5e:4x4", 16, 1),
        ("v5e-256", "v5e:16x16", 256, 1),
        ("v6e-256", "v6e:16x16", 256, 1),
        ("v5p-128", "v5p:4x4x4", 64, 1),  # counts TensorCores
        ("v4-8", "v4:2x2x1", 4, 1),
        ("2xv5e-256", "v5e:16x16", 512, 2),
        ("gpu-8", "", 8, 1),
        ("host", "", 0, 1),
    ],
)
def test_names(name, topology, chips, slices):
    preset = find_preset(name)
    assert (preset.name, preset.topology_name, preset.num_chips, preset.num_slices) == (name, topology, chips, slices)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("v5e-265", "v5e-256"), ("v5litepod-16", "give host"), ("gpu-0", "gpu-8"), ("2xv5e-25", "v5e-256")],
)
def test_an_unknown_name_is_told(name, hint):
    with pytest.raises(UserError, match=f"mesh.preset={name} is unknown.*{hint}"):
        find_preset(name)


@pytest.mark.parametrize(
    ("text", "slices", "name"),
    [("v5e:16x16", 1, "v5e-256"), ("v5p:4x4x4", 1, "v5p-128"), ("v5e:16x16", 2, "2xv5e-256"), ("v6e-8", 1, "v6e-8")],
)
def test_topologies(text, slices, name):
    assert parse_topology(text, slices).num_chips == find_preset(name).num_chips
    assert parse_topology(text, slices).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:5x5", "no such slice of v5e; choose one of 1x1, 2x2"),
        ("v5e:4xfour", "no such slice"),
        ("v5w:4x4", "no TPU is called v5w; did you mean 'v5"),
        ("gpu-8", "is no TPU slice"),
    ],
)
def test_a_topology_that_does_not_exist(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("preset", "rules", "tensor", "shape"),
    [
        ("v5e-16", "hybrid", 1, (1, 16, 1)),
        ("v5e-256", "hybrid", 1, (16, 16, 1)),
        ("v5e-256", "fsdp", 1, (1, 256, 1)),
        ("v5e-256", "replicated", 1, (256, 1, 1)),
        ("v5e-256", "hybrid", 4, (16, 4, 4)),
        ("2xv5e-256", "fsdp", 1, (2, 256, 1)),  # data crosses the slices
        ("2xv5e-256", "hybrid", 2, (32, 8, 2)),
        ("gpu-16", "hybrid", 1, (2, 8, 1)),  # inside a host of 8
    ],
)
def test_shapes(preset, rules, tensor, shape):
    found = find_preset(preset)
    assert preset_shape(found, MeshConfig(rules=rules, tensor=tensor), found.num_chips, 8) == shape


def test_a_preset_is_for_as_many_devices_as_there_are():
    assert dict(make_mesh(MeshConfig(preset="gpu-8")).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(preset="host", tensor=2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    for preset in ("gpu-4", "v5e-8"):
        with pytest.raises(UserError, match=f"mesh.preset={preset}: is for .* and here are 8 of cpu"):
            make_mesh(MeshConfig(preset=preset))
    with pytest.raises(UserError, match=r"mesh.tensor=3 does not divide"):
        make_mesh(MeshConfig(preset="host", tensor=3))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("rules=replicate",), "mesh.rules=replicate is unknown; did you mean 'replicated'"),
        (("preset=v5e-16", "fsdp=4"), "gives mesh.data and mesh.fsdp"),
        (("rules=replicated", "tensor=2"), "splits no parameter"),
    ],
)
def test_what_does_not_go_together(sets, message):
    with pytest.raises(UserError, match=message):
        validate(override(MeshConfig(), sets))


def test_a_mesh_of_before_presets_is_the_same():
    assert from_dict(MeshConfig, {"data": -1, "fsdp": 4, "tensor": 1}) == MeshConfig(fsdp=4)


def boxed(key):
    return {"kernel": nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))(key, (8, 16))}


EMBED = ("embed", None)


def test_everything_follows_the_mesh_s_table():
    whole, split = make_mesh(MeshConfig(rules="replicated", fsdp=4)), make_mesh(MeshConfig(fsdp=4))
    assert (rules_of(whole), rules_of(split)) == (REPLICATED, RULES)
    assert whole != split  # programs compiled for one are not taken for the other
    assert abstract_state(boxed, whole)[0]["kernel"].sharding.spec == P()
    assert abstract_state(boxed, split)[0]["kernel"].sharding.spec == P("fsdp", "tensor")
    x = jnp.ones((8, 4))
    for mesh in (whole, split):
        with jax.set_mesh(mesh), axis_rules():
            assert jax.jit(lambda x: constrain(x, "batch", "length"))(x).sharding.spec[0] == ("data", "fsdp")
            text = str(jax.make_jaxpr(lambda x: map_local(lambda x: 2 * x, [x], [EMBED], EMBED))(x))
            assert ("fsdp" in text.split("in_specs")[1].split("jaxpr")[0]) == (mesh is split)


def test_hybrid_is_the_usual_table():
    assert rules_of(make_mesh(MeshConfig(rules="hybrid", fsdp=4))) is RULES


def test_chips_are_known_by_their_kind():
    assert find_chip("TPU v5 lite") is find_chip("v5e")
    assert find_chip("TPU v5").name == "v5p"
    assert find_chip("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_chip("cpu") is None
    assert find_chip("NVIDIA L40S") is None
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    for chip in CHIPS:  # a sheet's figures have these sizes, or a unit was mistaken
        assert 1e14 < chip.peak_flops < 1e15
        assert 1e10 < chip.hbm_bytes < 2e11
        assert 2e11 < chip.hbm_bandwidth < 1e13
        assert 1e9 < chip.dcn_bandwidth_per_chip < chip.link_bandwidth < chip.hbm_bandwidth
    assert {preset.chip for preset in SLICES.values()} == {"v4", "v5e", "v5p", "v6e"}


def test_small_states_are_kept_whole():
    chip = find_chip("v5e")
    assert suggest_rules(1 << 30, chip) == "replicated"
    assert suggest_rules(8 << 30, chip) == "hybrid"


def test_candidates_differ():
    meshes = candidate_meshes(find_preset("v5e-16"))
    shapes = [preset_shape(find_preset("v5e-16"), one, 16, 16) for one in meshes]
    assert len(set(shapes)) == len(shapes)
    assert {(16, 1, 1), (1, 16, 1)} <= set(shapes)
