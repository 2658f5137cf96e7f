"""What counts as a file of an official directory, and what is looked into of those that no run is made of."""

import dataclasses
import pathlib
import shutil

import pytest
from safetensors.numpy import load_file

from cv2jax.config import UserError
from cv2jax.convert.qwen import read_backbone_config
from cv2jax.jobs.official_checks import check_backbone_files, check_estimator, still_sound
from cv2jax.jobs.official_files import list_files
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
