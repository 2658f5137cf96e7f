"""Programs of a bundle that a CPU machine has written compile for a TPU that it does not have."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from cv2jax.synthesis.bundle import MEL, SPEECH, WAVE
from cv2jax.synthesis.bundle_files import PROGRAMS
from cv2jax.tasks import bundle as writer
from cv2jax.tasks.bundle_parts import served_config, served_params
from tests import small_bundle

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("stage", "program"), [(SPEECH, "decode.b2.s128"), (MEL, "step.r50.l10"), (WAVE, "step.f8")])
def test_a_stage_compiles_for_v5e(stage, program, tmp_path):
    (tmp_path / PROGRAMS).mkdir()
    part = small_bundle.make_parts().stages[stage]
    arrays = served_params(stage, part.config, part.load(), "bfloat16")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    programs, states = writer._programs(stage, served_config(stage, part.config, "bfloat16"), small_bundle.SIZES)
    chosen = [each for each in programs if each.name == program]
    manifest = {"programs": [], "states": {}}
    writer._export_all((chosen, states), shapes, ["cpu", "tpu"], tmp_path, manifest, whole=False)
    [about] = [each for each in manifest["programs"] if "tpu" in each["platforms"]]
    exported = export.deserialize(bytearray((tmp_path / PROGRAMS / about["file"]).read_bytes()))
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = SingleDeviceSharding(device)
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, leaves)
    assert jax.jit(exported.call).lower(*arguments).compile().as_text().startswith("HloModule")
