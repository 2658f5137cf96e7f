"""Hugging Face Qwen2 directories: equal hidden states, an exact round trip, and one line for whatever is wrong.

`goldens/qwen2_hf_tied` (fp32, one file) and `qwen2_hf_untied` (bf16, three files with an index) were saved by transformers
5.24 with random weights; the `.npz` beside each holds ragged tokens and the hidden states of the embeddings, the first
block and the final norm, computed by it in fp32.
"""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cv2jax.config import MeshConfig, UserError
from cv2jax.convert.qwen import SafetensorsReader, load_backbone, read_backbone_config, save_backbone
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Backbone
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TIED, UNTIED = GOLDENS / "qwen2_hf_tied", GOLDENS / "qwen2_hf_untied"


def tensors(directory):
    """Every tensor, read by the safetensors package alone."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture
def copy(tmp_path):
    """A copy of a directory, its tensors in one file after `change(tensors)`."""

    def make(source=TIED, change=lambda tensors: None, **config):
        place = tmp_path / "copy"
        place.mkdir()
        values = json.loads((source / "config.json").read_text()) | config
        (place / "config.json").write_text(json.dumps(values))
        found = tensors(source)
        change(found)
        safetensors.numpy.save_file(found, place / "model.safetensors")
        return place

    return make


def error(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("directory", "scan_layers"), [(TIED, True), (UNTIED, False)])
def test_hidden_states_equal_transformers(directory, scan_layers):
    golden = np.load(directory.with_suffix(".npz"))
    config = dataclasses.replace(read_backbone_config(directory), scan_layers=scan_layers)
    params = load_backbone(directory, config)
    x = params["text_embedding"][golden["tokens"]]
    size = x.shape[1]
    inside = np.arange(size) < golden["lengths"][:, None]
    mask = jnp.asarray(np.tril(np.ones((size, size), bool)) & inside[:, None, None])
    positions = jnp.broadcast_to(jnp.arange(size), inside.shape)
    np.testing.assert_array_equal(np.asarray(x)[inside], golden["embedded"][inside])

    y, _ = Qwen2Backbone(config).apply({"params": params["backbone"]}, x, positions, mask)
    np.testing.assert_allclose(np.asarray(y)[inside], golden["last"][inside], atol=1e-4)

    name = "blocks" if scan_layers else "blocks_0"
    first = jax.tree.map(lambda a: a[:1] if scan_layers else a, {name: params["backbone"][name]})
    first["final_norm"] = {"scale": jnp.ones(config.width)}
    one = dataclasses.replace(config, num_layers=1)
    y, _ = Qwen2Backbone(one).apply({"params": first}, x, positions, mask)
    mean_square = np.mean(golden["first"] ** 2, axis=-1, keepdims=True)
    expected = golden["first"] / np.sqrt(mean_square + config.norm_epsilon)
    np.testing.assert_allclose(np.asarray(y)[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize(("directory", "dtype"), [(TIED, "float32"), (UNTIED, "bfloat16")])
def test_round_trip_is_exact(directory, dtype, max_shard_bytes, tmp_path):
    config = dataclasses.replace(read_backbone_config(directory), scan_layers=dtype == "float32")
    params = load_backbone(directory, config)
    out = tmp_path / "out"
    save_backbone(params, config, out, dtype=dtype, carry_from=directory, max_shard_bytes=max_shard_bytes)
    assert_same_bits(tensors(out), tensors(directory))
    assert json.loads((out / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    index = out / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes < 10**9) != (out / "model.safetensors").exists()
    if index.exists():
        names = json.loads(index.read_text())
        sizes = {}
        for file in sorted(set(names["weight_map"].values())):
            held = safetensors.numpy.load_file(out / file)
            assert {name for name, at in names["weight_map"].items() if at == file} == set(held)
            sizes[file] = sum(value.nbytes for value in held.values())
            assert sizes[file] <= max_shard_bytes or len(held) == 1
        assert sum(sizes.values()) == names["metadata"]["total_size"]
    jax.tree.map(np.testing.assert_array_equal, load_backbone(out, config), params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_halves_are_rounded_to_even_and_the_head_stays_as_it_was(tmp_path):
    config = read_backbone_config(UNTIED)
    params = jax.tree.map(lambda a: np.asarray(a) * np.float32(1.1), load_backbone(UNTIED, config))
    save_backbone(params, config, tmp_path / "out", dtype="float16", carry_from=UNTIED)
    found = tensors(tmp_path / "out")
    assert_same_bits({"h": found["lm_head.weight"]}, {"h": tensors(UNTIED)["lm_head.weight"]})
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], params["text_embedding"].astype(np.float16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_tokenizer_files_are_carried(copy, tmp_path):
    source = copy()
    (source / "tokenizer.json").write_text("{}")
    (source / "merges.txt").write_text("a b\n")
    (source / "notes.txt").write_text("not ours")
    config = read_backbone_config(source)
    save_backbone(load_backbone(source), config, tmp_path / "new" / "out", carry_from=source)
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert (tmp_path / "new" / "out" / "merges.txt").read_text() == "a b\n"


def test_without_a_source_it_is_written_as_tied_with_a_warning(tmp_path, caplog):
    config = read_backbone_config(UNTIED)
    with caplog.at_level(logging.WARNING):
        save_backbone(load_backbone(UNTIED), config, tmp_path / "out", dtype="bfloat16")
    assert "text head needs carry_from" in caplog.text
    expected = tensors(UNTIED)
    del expected["lm_head.weight"]
    assert_same_bits(tensors(tmp_path / "out"), expected)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["tie_word_embeddings"] is True
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 12345.0  # transformers 4 and 5
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert read_backbone_config(tmp_path / "out") == config
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_spelling_of_transformers_4_is_read_and_kept(copy, tmp_path):
    source = copy(UNTIED, rope_theta=777.0, torch_dtype="bfloat16")
    values = json.loads((source / "config.json").read_text())
    del values["rope_parameters"], values["dtype"]
    (source / "config.json").write_text(json.dumps(values))
    config = read_backbone_config(source)
    assert config.rope_theta == 777.0
    save_backbone(load_backbone(source), config, tmp_path / "out", dtype="bfloat16", carry_from=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == values


def test_a_bare_model_is_saved_without_the_prefix(copy):
    def strip(found):
        for name in list(found):
            found[name.removeprefix("model.")] = found.pop(name)

    jax.tree.map(np.testing.assert_array_equal, load_backbone(copy(change=strip)), load_backbone(TIED))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_it_loads_into_the_shardings_asked_for(scan_layers, tmp_path):
    config = dataclasses.replace(read_backbone_config(UNTIED), scan_layers=scan_layers)
    full = TextSpeechLmConfig(backbone=config, num_speech_tokens=5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract, shardings = abstract_state(lambda key: init_params(full, key), mesh)
    params = load_backbone(UNTIED, config, abstract)
    wanted = {name: shardings[name] for name in ("text_embedding", "backbone")}
    assert jax.tree.map(lambda a: a.sharding, params) == wanted
    kernel = params["backbone"]["blocks" if scan_layers else "blocks_1"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    jax.tree.map(np.testing.assert_array_equal, params, load_backbone(UNTIED, config))
    save_backbone(params, config, tmp_path / "out", dtype="bfloat16", carry_from=UNTIED)
    assert_same_bits(tensors(tmp_path / "out"), tensors(UNTIED))


def test_all_tensors_that_do_not_fit_are_listed(copy):
    def change(found):
        found["model.layers.1.self_attn.q_proj.weight"] = found["model.layers.1.self_attn.q_proj.weight"][:8]
        del found["model.norm.weight"], found["model.layers.0.mlp.up_proj.weight"]
        found["model.layers.0.self_attn.o_proj.bias"] = np.zeros(48, np.float32)

    place = copy(change=change)
    text = error(load_backbone, place)
    assert text.startswith(f"{place} does not fit")
    assert "2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight; " in text
    assert "1 left over: model.layers.0.self_attn.o_proj.bias; " in text
    assert "model.layers.1.self_attn.q_proj.weight is [8 48] and must be [48 48]" in text


def test_other_sizes_are_named_together():
    config = dataclasses.replace(
        read_backbone_config(TIED), num_layers=2, rope_theta=1e4, dtype="bfloat16", remat="full"
    )
    text = error(load_backbone, TIED, config)
    assert "num_hidden_layers is 3, the model's num_layers 2; rope_theta is 1000000.0, the model's rope_theta 1" in text
    assert "remat" not in text
    assert "dtype" not in text


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_directory_without_a_file(copy, file):
    place = copy()
    (place / file).unlink()
    assert f"{place}: no " in error(load_backbone, place)
    assert file in error(load_backbone, place)


def test_configs_that_do_not_do(copy):
    place = copy(model_type="llama")
    assert "model_type is 'llama'" in error(load_backbone, place)
    for text, reason in (("{", "cannot be read"), ("[]", "no object"), ('{"model_type": "qwen2"}', "lacks")):
        (place / "config.json").write_text(text)
        assert reason in error(read_backbone_config, place)
    values = json.loads((TIED / "config.json").read_text()) | {"hidden_size": "48"}
    (place / "config.json").write_text(json.dumps(values))
    assert "another kind" in error(read_backbone_config, place)


@pytest.mark.parametrize("size", [0, 5, 400, -4])
def test_damaged_weights(copy, size):
    place = copy()
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:size])
    text = error(load_backbone, place)
    assert text.startswith(f"{place / 'model.safetensors'}: is damaged")


def test_an_index_that_does_not_fit(tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(UNTIED, place)
    index = place / "model.safetensors.index.json"
    whole = index.read_text()
    values = json.loads(whole)
    values["weight_map"]["model.more"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    values["weight_map"] |= {f"model.layers.{i}.more": "model-00001-of-00003.safetensors" for i in range(7)}
    index.write_text(json.dumps(values))
    assert "its shards (only on one side: model.layers.{0-6}.more, model.more); copy" in error(load_backbone, place)
    gone = place / "model-00002-of-00003.safetensors"
    gone.unlink()
    assert "not there (model-00002-of-00003.safetensors)" in error(load_backbone, place)
    outside = shutil.copyfile(UNTIED / gone.name, tmp_path / "outside")
    for name in ("../outside", str(outside), "deep/../../outside"):
        changed = {key: file.replace(gone.name, name) for key, file in json.loads(whole)["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": changed}))
        assert f"{index}: names {name!r}, which is no file beside it; copy it again" in error(load_backbone, place)
    gone.symlink_to(outside)  # as in the hub's caches
    index.write_text(whole)
    load_backbone(place)
    index.write_text('{"weight_map": {}}')
    assert "no weight_map" in error(load_backbone, place)


def test_a_type_without_meaning(copy):
    place = copy()
    length = int.from_bytes((place / "model.safetensors").read_bytes()[:8], "little")
    data = bytearray((place / "model.safetensors").read_bytes())
    data[8 : 8 + length] = data[8 : 8 + length].replace(b'"F32"', b'"U32"')
    (place / "model.safetensors").write_bytes(data)
    assert "is U32; give weights in fp32" in error(load_backbone, place)


def test_a_failed_save_leaves_nothing(tmp_path):
    config = read_backbone_config(UNTIED)
    params = load_backbone(UNTIED)
    out = tmp_path / "out"
    broken = jax.tree.map(np.array, params)
    broken["backbone"]["final_norm"]["scale"][3] = 1e5
    text = error(save_backbone, broken, config, out, dtype="float16", carry_from=UNTIED)
    assert text.startswith("model.norm.weight: has values that are not finite in float16")
    assert "choose" in error(save_backbone, params, config, out, dtype="int8")
    assert "num_hidden_layers is 3" in error(save_backbone, params, config, out, carry_from=TIED)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    save_backbone(params, config, out, carry_from=UNTIED)
    before = (out / "model.safetensors").stat()
    assert "exists already" in error(save_backbone, params, config, out)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error(save_backbone, params, config, tmp_path / "file" / "out")
    assert (out / "model.safetensors").stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_more_is_written_before_the_directory_appears(tmp_path, caplog):
    out, seen = tmp_path / "out", []

    def finish(place):
        seen.extend(path.name for path in place.iterdir())
        assert not out.exists()
        (place / "model.py").write_text("")

    with caplog.at_level("WARNING", logger="absl"):
        save_backbone(load_backbone(TIED), read_backbone_config(TIED), out, finish=finish)
    assert sorted([*seen, "model.py"]) == sorted(path.name for path in out.iterdir())
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(out)]


def test_an_untied_source_must_have_its_head(copy, tmp_path):
    source = copy(tie_word_embeddings=False)
    text = error(
        save_backbone, load_backbone(source), read_backbone_config(source), tmp_path / "out", carry_from=source
    )
    assert "lm_head.weight is missing, an untied model has [97, 48]" in text


def test_only_the_block_asked_for_is_read():
    with SafetensorsReader(UNTIED) as reader:
        shape, dtype = reader.names()["model.layers.1.mlp.up_proj.weight"]
        assert (shape, dtype) == ((80, 48), np.dtype(jnp.bfloat16))
        block = reader.read("model.layers.1.mlp.up_proj.weight", (slice(10, 30), slice(4, 5)))
    np.testing.assert_array_equal(block, tensors(UNTIED)["model.layers.1.mlp.up_proj.weight"][10:30, 4:5])
