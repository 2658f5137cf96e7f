"""llm.pt, flow.pt and hift.pt: the golden files make the whole trip bit for bit, in every spelling that they have."""

import functools
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.official import (
    HiftReader,
    llm_rules,
    read_flow,
    read_hift,
    read_llm,
    write_flow,
    write_hift,
    write_llm,
)
from cv2jax.convert.rules import foreign_tensors
from cv2jax.convert.torch_file import TorchReader
from cv2jax.convert.weight_norm import NEW, OLD
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from tests.convert.test_official_sizes import FLOW, LM
from tests.models.golden_hift import GOLDEN_CONFIG, GOLDENS, abstract_params, golden_params
from tests.official_directory import same_tensors

GOLDEN = pathlib.Path(GOLDENS) / "official_model_tiny"
HEAD, TABLE = "llm.model.lm_head.weight", "llm.model.model.embed_tokens.weight"


@functools.cache
def abstract_lm(config=LM):
    return nn.unbox(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))


@functools.cache
def abstract_flow():
    return nn.unbox(jax.eval_shape(lambda key: init_flow(FLOW, key), jax.random.key(0)))


def test_the_official_inventory_of_the_language_model():
    tensors = foreign_tensors(llm_rules(), abstract_lm(TextSpeechLmConfig()), "ours")
    assert len(tensors) + 1 == 295  # the text head is the text table
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == 505_803_812
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["llm_embedding.weight"] == (2, 896)
    assert shapes["llm_decoder.weight"] == shapes["speech_embedding.weight"] == (6564, 896)
    assert shapes["llm.model.model.layers.23.self_attn.k_proj.weight"] == (128, 896)
    assert shapes[TABLE] == (151936, 896)


@pytest.mark.official
class TestFiles:
    """With torch."""

    torch = property(lambda self: pytest.importorskip("torch"))

    def load(self, path):
        return self.torch.load(path, weights_only=True)

    def test_the_language_model_makes_the_whole_trip(self, tmp_path):
        params = read_llm(TorchReader(GOLDEN / "llm.pt"), abstract_lm())
        theirs = self.load(GOLDEN / "llm.pt")
        np.testing.assert_array_equal(params["head_kernel"], theirs["llm_decoder.weight"].T)
        np.testing.assert_array_equal(params["special_embedding"], theirs["llm_embedding.weight"])
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        write_llm(tmp_path / "llm.pt", params)
        back = self.load(tmp_path / "llm.pt")
        assert same_tensors(back, theirs) == []
        assert back[HEAD].untyped_storage().data_ptr() == back[TABLE].untyped_storage().data_ptr()

    @pytest.mark.parametrize("kind", ["without", "copy", "training"])
    def test_the_spellings_of_llm_pt(self, tmp_path, kind):
        theirs = self.load(GOLDEN / "llm.pt")
        changed = dict(theirs)
        if kind == "without":
            del changed[HEAD]
        if kind == "copy":
            changed[HEAD] = changed[HEAD].clone()
        if kind == "training":
            changed |= {"epoch": 7, "step": 12}
        self.torch.save(changed, tmp_path / "in.pt")
        write_llm(tmp_path / "out.pt", read_llm(TorchReader(tmp_path / "in.pt"), abstract_lm()))
        assert same_tensors(self.load(tmp_path / "out.pt"), theirs) == []

    def test_an_untied_text_head_is_refused(self, tmp_path):
        theirs = dict(self.load(GOLDEN / "llm.pt"))
        theirs[HEAD] = theirs[HEAD].clone()
        theirs[HEAD][500, 3] += 1e-6
        self.torch.save(theirs, tmp_path / "llm.pt")
        with pytest.raises(UserError, match=rf"llm\.pt: {HEAD} differs from {TABLE}.*tied embeddings"):
            read_llm(TorchReader(tmp_path / "llm.pt"), abstract_lm())

    def test_the_flow_makes_the_whole_trip(self, tmp_path):
        write_flow(tmp_path / "flow.pt", read_flow(TorchReader(GOLDEN / "flow.pt"), abstract_flow()))
        assert same_tensors(self.load(tmp_path / "flow.pt"), self.load(GOLDEN / "flow.pt")) == []

    def test_what_is_missing_too_much_or_of_another_shape_is_listed_from_both_sides(self, tmp_path):
        theirs = dict(self.load(GOLDEN / "flow.pt"))
        del theirs["encoder.after_norm.bias"]
        theirs["encoder_proj.wait"] = theirs.pop("encoder_proj.weight")
        theirs["encoder_proj.bias"] = theirs["encoder_proj.bias"][:-1]
        self.torch.save(theirs, tmp_path / "flow.pt")
        with pytest.raises(UserError) as caught:
            read_flow(TorchReader(tmp_path / "flow.pt"), abstract_flow())
        said = str(caught.value)
        assert f"{tmp_path / 'flow.pt'} does not fit the model: 2 missing: " in said
        assert "encoder.after_norm.bias" in said.split("1 left over")[0]
        assert "encoder_proj.weight" in said.split("1 left over")[0]
        assert "1 left over: encoder_proj.wait" in said
        assert "1 of another shape: encoder_proj.bias is [79] and must be [80]" in said

    def test_the_vocoder_keeps_the_pairs_that_it_came_with(self, tmp_path):
        reader = HiftReader(GOLDEN / "hift.pt")
        params = read_hift(reader, GOLDEN_CONFIG, abstract_params(GOLDEN_CONFIG))
        jax.tree.map(np.testing.assert_array_equal, params, golden_params())
        theirs = self.load(GOLDEN / "hift.pt")
        write_hift(tmp_path / "kept.pt", GOLDEN_CONFIG, params, kept=HiftReader(GOLDEN / "hift.pt"))
        assert same_tensors(self.load(tmp_path / "kept.pt"), theirs) == []
        write_hift(tmp_path / "new.pt", GOLDEN_CONFIG, params)
        new = self.load(tmp_path / "new.pt")
        assert set(new) == set(theirs)
        assert all(NEW[0] in name or NEW[1] in name for name in same_tensors(new, theirs))
        assert len(same_tensors(new, theirs)) > 50  # so that the pairs above were kept for a reason
        # One kernel is trained: its pair is new, the others stay.
        params["generator"]["conv_out"]["kernel"] = params["generator"]["conv_out"]["kernel"] * 1.5
        write_hift(tmp_path / "tuned.pt", GOLDEN_CONFIG, params, kept=reader)
        tuned = self.load(tmp_path / "tuned.pt")
        assert same_tensors(tuned, theirs) == [f"conv_post.{NEW[0]}", f"conv_post.{NEW[1]}"]
        g, v = (tuned[f"conv_post.{half}"].numpy() for half in NEW)
        norm = np.sqrt((v.astype(np.float64) ** 2).sum((1, 2), keepdims=True))
        want = np.transpose(params["generator"]["conv_out"]["kernel"], (2, 1, 0))
        np.testing.assert_allclose(g * v / norm, want, rtol=1e-6)

    @pytest.mark.parametrize("kind", ["old", "generator", "gan"])
    def test_the_spellings_of_hift_pt(self, tmp_path, kind, caplog):
        theirs = self.load(GOLDEN / "hift.pt")
        renamed = {name.replace(NEW[0], OLD[0]).replace(NEW[1], OLD[1]): t for name, t in theirs.items()}
        if kind == "generator":
            renamed = {f"generator.{name}": tensor for name, tensor in theirs.items()}
        if kind == "gan":
            judge = {"discriminator.mpd.discriminators.0.conv_post.bias": self.torch.zeros(1), "epoch": 3}
            renamed = {f"generator.{name}": tensor for name, tensor in renamed.items()} | judge
        self.torch.save(renamed, tmp_path / "hift.pt")
        reader = HiftReader(tmp_path / "hift.pt")
        params = read_hift(reader, GOLDEN_CONFIG, abstract_params(GOLDEN_CONFIG))
        jax.tree.map(np.testing.assert_array_equal, params, golden_params())
        assert ("the 1 tensors of its discriminators are left out" in caplog.text) == (kind == "gan")
        write_hift(tmp_path / "out.pt", GOLDEN_CONFIG, params, kept=reader)
        judged = ("discriminator.", "epoch")
        spelt = {name: tensor for name, tensor in renamed.items() if not name.startswith(judged)}
        assert same_tensors(self.load(tmp_path / "out.pt"), spelt) == []
        write_hift(tmp_path / "new.pt", GOLDEN_CONFIG, params, names="parametrised", kept=reader)
        assert same_tensors(self.load(tmp_path / "new.pt"), theirs) == []
        write_hift(tmp_path / "named.pt", GOLDEN_CONFIG, params, names="weight_g", kept=reader)
        named = self.load(tmp_path / "named.pt")
        assert {n.replace(OLD[0], NEW[0]).replace(OLD[1], NEW[1]) for n in named} == set(theirs)
        assert f"conv_pre.{OLD[1]}" in named
