"""What counts as a file of an official directory, and what is looked into of those that no run is made of."""

import dataclasses
import json
import os
import pathlib
import shutil
import zipfile

import pytest
from safetensors.numpy import load_file

from cv2jax.config import UserError
from cv2jax.convert.qwen import read_backbone_config
from cv2jax.jobs.official_checks import check_backbone_files, check_carried, check_estimator, still_sound
from cv2jax.jobs.official_files import keep_files, list_files, load_kept
from tests.models.golden_hift import GOLDENS

GOLDEN = pathlib.Path(GOLDENS) / "official_model_tiny"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


def test_links_are_followed_circles_are_not_and_hidden_files_are_none(tmp_path):
    official, elsewhere = tmp_path / "official", tmp_path / "blobs"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "b").write_text("b")
    (official / ".git").mkdir(parents=True)
    (official / ".git" / "pack").write_text("x")
    (official / ".gitattributes").write_text("x")
    (official / "a").write_text("a")
    (official / "one").symlink_to(elsewhere)
    (official / "two").symlink_to(elsewhere)  # the same again is no circle
    (official / "file").symlink_to(official / "a")
    (official / "gone").symlink_to(tmp_path / "nowhere")
    (elsewhere / "deep" / "up").symlink_to(official)
    assert list_files(official) == ["a", "file", "one/deep/b", "two/deep/b"]


def test_a_directory_of_any_name_is_noted(tmp_path):
    official = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/of\xff"))
    try:
        official.mkdir()
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    (official / "a").write_text("a")
    keep_files(official, ["a"], tmp_path / "model", {"text_speech_lm": "1"})
    assert json.loads((tmp_path / "model" / "official.json").read_text())["source"] == f"{tmp_path}/of\\xff"
    assert load_kept(tmp_path / "model").names == ["a"]


def test_the_weights_of_the_backbone_are_held_against_its_config(tmp_path):
    place = shutil.copytree(GOLDEN / "CosyVoice-BlankEN", tmp_path / "blank")
    config = read_backbone_config(place)
    assert check_backbone_files(place, config)
    with pytest.raises(
        UserError, match=r"blank does not fit .* of another shape: .*mlp\.down_proj\.weight is \[32 64\]"
    ):
        check_backbone_files(place, dataclasses.replace(config, mlp_dim=65))
    (place / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"model\.safetensors: is only git's pointer to the file; .*`git lfs pull`"):
        check_backbone_files(place, config)
    (place / "model.safetensors").unlink()
    assert not check_backbone_files(place, config)


@pytest.mark.official
def test_weights_of_torch_are_weights_too(tmp_path):
    torch = pytest.importorskip("torch")
    place = shutil.copytree(GOLDEN / "CosyVoice-BlankEN", tmp_path / "blank")
    tensors = {name: torch.from_numpy(a) for name, a in load_file(place / "model.safetensors").items()}
    (place / "model.safetensors").unlink()
    torch.save(tensors, place / "pytorch_model.bin")
    assert check_backbone_files(place, read_backbone_config(place))
    del tensors["model.norm.weight"]
    torch.save(tensors, place / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"1 missing: model\.norm\.weight"):
        check_backbone_files(place, read_backbone_config(place))


@pytest.mark.official
def test_what_only_goes_through_is_let_through_where_it_is_sound(tmp_path):
    torch, onnx = pytest.importorskip("torch"), pytest.importorskip("onnx")
    torch.save({"w": torch.ones(3), "optimizer": [{"step": 3, "betas": (0.9, 0.99)}]}, tmp_path / "llm.rl.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "flow.encoder.fp16.zip", "w") as archive:
        archive.writestr("code/x.py", "")
    (tmp_path / "text.bin").write_text("config\nof a program\n")
    (tmp_path / "zeros.bin").write_bytes(bytes(99))
    loaded = onnx.load(GOLDEN / "campplus.onnx")
    loaded.graph.initializer.append(
        onnx.TensorProto(name="p", dims=[3], data_type=onnx.TensorProto.INT4, raw_data=b"ab")
    )
    onnx.save(loaded, tmp_path / "flow.decoder.estimator.int4.onnx")
    shutil.copyfile(GOLDEN / "CosyVoice-BlankEN" / "model.safetensors", tmp_path / "a.safetensors")
    check_carried(tmp_path, list_files(tmp_path))


@pytest.mark.official
def test_an_estimator_is_read_and_another_graph_is_told(tmp_path, caplog):
    pytest.importorskip("onnx")
    check_estimator(GOLDEN / "campplus.onnx")
    assert "campplus.onnx: is not the flow's velocity network (has no input cond, mask, mu, spks, t, x)" in caplog.text
    for content, message in ((POINTER, "is only git's pointer"), (b"abc", "is damaged")):
        (tmp_path / "e.onnx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            check_estimator(tmp_path / "e.onnx")
        assert not still_sound(tmp_path / "e.onnx")
    assert "copy it again; a new one is written" in caplog.text
