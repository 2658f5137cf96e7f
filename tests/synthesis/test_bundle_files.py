import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from cv2jax.config import UserError
from cv2jax.synthesis import bundle_files as files


@pytest.fixture
def bundle(tmp_path):
    """A manifest and two files."""
    (tmp_path / "parameters").mkdir()
    files.write_arrays(tmp_path / "parameters" / "a.safetensors", [("x", np.arange(6, dtype=np.float32))])
    (tmp_path / "notes.txt").write_text("é")
    files.write_manifest(tmp_path, {"files": files.describe_files(tmp_path), "platforms": ["cpu"]})
    return tmp_path


def test_a_whole_bundle_is_read(bundle):
    manifest = files.read_manifest(bundle)
    assert manifest["schema"] == files.SCHEMA
    assert sorted(manifest["files"]) == ["notes.txt", "parameters/a.safetensors"]
    assert manifest["files"]["notes.txt"]["bytes"] == 2
    start = time.perf_counter()
    assert 0 < files.check_files(bundle, manifest) <= time.perf_counter() - start
    assert files.is_bundle(bundle)
    assert not files.is_bundle(bundle / "parameters")


def test_any_changed_byte_of_the_manifest_is_found(bundle):
    place = bundle / files.MANIFEST
    good = place.read_bytes()
    for at in range(0, len(good), 7):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 7)
        place.write_bytes(bytes(bad))
        with pytest.raises(UserError, match=r"damaged|schema") as error:
            files.read_manifest(bundle)
        assert "\n" not in str(error.value)
    for size in (0, 1, len(good) - 1):
        place.write_bytes(good[:size])
        with pytest.raises(UserError, match="damaged"):
            files.read_manifest(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "parameters/a.safetensors"])
def test_any_changed_byte_of_a_file_is_found(bundle, name):
    manifest, good = files.read_manifest(bundle), (bundle / name).read_bytes()
    for at in (0, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 4
        (bundle / name).write_bytes(bytes(bad))
        with pytest.raises(UserError, match=f"{name}: is damaged"):
            files.check_files(bundle, manifest)
    (bundle / name).write_bytes(good[:-1])
    with pytest.raises(UserError, match=f"{name}: has {len(good) - 1} bytes, the bundle's {len(good)}"):
        files.check_files(bundle, manifest)
    (bundle / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        files.check_files(bundle, manifest)


def test_a_newer_schema_and_what_is_no_bundle(bundle, tmp_path_factory):
    about = json.loads((bundle / files.MANIFEST).read_text()) | {"schema": files.SCHEMA + 1}
    (bundle / files.MANIFEST).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"schema 2, this cv2jax reads 1; update cv2jax"):
        files.read_manifest(bundle)
    for text in ("[]", "3", '{"schema": "x"}', "[" * 100_000):
        (bundle / files.MANIFEST).write_text(text)
        with pytest.raises(UserError, match="damaged"):
            files.read_manifest(bundle)
    with pytest.raises(UserError, match="no bundle"):
        files.read_manifest(tmp_path_factory.mktemp("empty"))


def test_arrays_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a/b": rng.normal(size=(3, 5)).astype(np.float32),
        "half": np.asarray(jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16)),
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(5, np.int32),
        "turned": rng.normal(size=(4, 2)).astype(np.float32).T,
    }
    files.write_arrays(tmp_path / "x.safetensors", arrays.items())
    found = files.read_arrays(tmp_path / "x.safetensors")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes()
    del arrays["half"]  # of which safetensors' own reader for numpy knows nothing
    files.write_arrays(tmp_path / "y.safetensors", arrays.items())
    np.testing.assert_array_equal(load_file(tmp_path / "y.safetensors")["turned"], arrays["turned"])


def test_arrays_that_no_stage_has_and_files_that_hold_none(tmp_path):
    with pytest.raises(ValueError, match="x is of float64"):
        files.write_arrays(tmp_path / "x.safetensors", [("x", np.zeros(2))])
    for data in (b"", b"\0" * 8, b"\xff" * 40, (60).to_bytes(8, "little") + b'{"x": {"dtype": "F32"}}' + b" " * 37):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="no safetensors of a bundle"):
            files.read_arrays(tmp_path / "x.safetensors")
