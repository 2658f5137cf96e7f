"""The official vocoder's state dict makes the whole trip, in every spelling that it has."""

import dataclasses

import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.discriminators import discriminator_rules
from cv2jax.convert.hift import PREFIX, hift_rules, weight_norm_style
from cv2jax.convert.rules import foreign_tensors, load_tree
from cv2jax.convert.weight_norm import NEW, OLD, FoldedReader, fold, unfold_tensors
from cv2jax.models.hift_vocoder.config import F0_UNIT_HZ, MEL_UNIT, HiftVocoderConfig
from tests.convert.test_weight_norm import DictReader, values
from tests.models.golden_hift import (
    GOLDEN_CONFIG,
    GOLDENS,
    abstract_params,
    golden_params,
    random_params,
    small_config,
)

RULES = hift_rules(GOLDEN_CONFIG)


def official() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "hift_tiny_weights.npz"))


def load(tensors, prefix="", config=GOLDEN_CONFIG, **options):
    reader = FoldedReader(DictReader(tensors))
    return load_tree(hift_rules(config, prefix), reader, abstract_params(config), **options)


def write(params, prefix="", config=GOLDEN_CONFIG):
    return values(unfold_tensors(foreign_tensors(hift_rules(config, prefix), params, "ours"), weight_norm_style))


def pairs(tensors):
    """(name of g, name of v) of every normalised kernel."""
    return [(name, name.replace(NEW[0], NEW[1])) for name in tensors if name.endswith(NEW[0])]


def test_the_golden_makes_the_whole_trip():
    theirs = official()
    back = write(golden_params())
    assert {name: (a.shape, a.dtype) for name, a in back.items()} == {
        name: (a.shape, a.dtype) for name, a in theirs.items()
    }
    normed = pairs(theirs)
    assert len(normed) == 2 + 3 + 5 + 12 * 6
    for name in set(theirs) - {half for pair in normed for half in pair}:
        np.testing.assert_array_equal(back[name], theirs[name], err_msg=name)
    for g, v in normed:
        np.testing.assert_allclose(fold(back[g], back[v]), fold(theirs[g], theirs[v]), rtol=3e-7, err_msg=v)
    again = load(back)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), again, golden_params())


def test_every_kernel_stands_where_the_model_reads_it():
    """By hand, one of each kind: what a transposed axis or a wrong number would mix up."""
    theirs, ours = official(), golden_params()

    def kernel(name):
        return fold(theirs[f"{name}.{NEW[0]}"], theirs[f"{name}.{NEW[1]}"])

    generator, f0 = ours["generator"], ours["f0_predictor"]
    for place, name in (
        (generator["conv_out"], "conv_post"),
        (generator["block_1_7"]["dilated_2"], "resblocks.4.convs1.2"),
        (generator["block_2_3"]["plain_0"], "resblocks.6.convs2.0"),
        (generator["source_block_2"]["plain_1"], "source_resblocks.2.convs2.1"),
        (f0["conv_3"], "f0_predictor.condnet.6"),
    ):
        np.testing.assert_array_equal(place["kernel"], kernel(name).transpose(2, 1, 0))
        np.testing.assert_array_equal(place["bias"], theirs[f"{name}.bias"])
    for place, name in ((generator["conv_in"], "conv_pre"), (f0["conv_0"], "f0_predictor.condnet.0")):
        np.testing.assert_array_equal(place["kernel"], MEL_UNIT * kernel(name).transpose(2, 1, 0))
        np.testing.assert_array_equal(place["bias"], theirs[f"{name}.bias"])
    np.testing.assert_array_equal(generator["upsample_1"]["kernel"], kernel("ups.1").transpose(2, 0, 1))
    np.testing.assert_array_equal(
        generator["source_down_0"]["kernel"], theirs["source_downs.0.weight"].transpose(2, 1, 0)
    )
    alpha = theirs["resblocks.8.activations2.1.alpha"]
    np.testing.assert_array_equal(generator["block_2_11"]["snake_plain_1"]["alpha"], alpha)
    np.testing.assert_array_equal(ours["source"]["kernel"], theirs["m_source.l_linear.weight"].T)


def test_the_f0_predictor_counts_in_another_unit_bit_for_bit():
    theirs, out = official(), golden_params()["f0_predictor"]["out"]
    np.testing.assert_array_equal(F0_UNIT_HZ * out["kernel"], theirs["f0_predictor.classifier.weight"].T)
    np.testing.assert_array_equal(F0_UNIT_HZ * out["bias"], theirs["f0_predictor.classifier.bias"])


def test_upsampling_may_count_in_another_unit_bit_for_bit():
    params, config = golden_params(), dataclasses.replace(GOLDEN_CONFIG, upsampling_unit=16.0)
    ours = load(official(), config=config)
    for stage in range(3):
        name = f"upsample_{stage}"
        want = 16 * params["generator"][name]["kernel"]
        np.testing.assert_array_equal(ours["generator"][name]["kernel"], want)
    ours["generator"] |= {name: params["generator"][name] for name in params["generator"] if "upsample" in name}
    jax.tree.map(np.testing.assert_array_equal, ours, params)


def test_the_old_spelling_loads_the_same():
    renamed = {name.replace(NEW[0], OLD[0]).replace(NEW[1], OLD[1]): a for name, a in official().items()}
    assert any(name.endswith("weight_v") for name in renamed)
    jax.tree.map(np.testing.assert_array_equal, load(renamed), golden_params())


@pytest.mark.slow
def test_the_generator_of_a_gan_training_loads_and_is_written_the_same():
    theirs = {PREFIX + name: a for name, a in official().items()}
    other = {"discriminator.mpd.discriminators.0.conv_post.bias": np.zeros(1, np.float32)}
    loaded = load(theirs | other, PREFIX, ignored=[r"discriminator\..*"])
    jax.tree.map(np.testing.assert_array_equal, loaded, golden_params())
    assert set(write(loaded, PREFIX)) == set(theirs)
    with pytest.raises(UserError, match=r"1 left over: discriminator\.mpd"):
        load(theirs | other, PREFIX)
    with pytest.raises(UserError, match=r"missing: .*conv_pre\.bias"):
        load(theirs)
    assert not {rule.foreign for rule in discriminator_rules()} & {rule.foreign for rule in hift_rules(GOLDEN_CONFIG)}


def test_which_kernels_are_normalised():
    for name in ("m_source.l_linear", "source_downs.1", "f0_predictor.classifier"):
        assert weight_norm_style(f"{name}.weight") is weight_norm_style(f"{PREFIX}{name}.weight") is None
    for name in ("conv_pre", "ups.2", "source_resblocks.0.convs1.0", "f0_predictor.condnet.8"):
        assert weight_norm_style(f"{name}.weight") == weight_norm_style(f"{PREFIX}{name}.weight") == NEW


def test_another_number_of_stages_and_kernels_makes_the_trip():
    config = small_config()
    params = random_params(config)
    written = write(params, config=config)
    assert "resblocks.3.convs1.1.bias" in written
    assert not any(name.startswith(("resblocks.4.", "ups.2.")) for name in written)
    loaded = load(written, config=config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), loaded, params)


def test_the_official_inventory_has_its_size():
    config = HiftVocoderConfig()
    tensors = unfold_tensors(
        foreign_tensors(hift_rules(config), abstract_params(config), "ours"), weight_norm_style
    )  # shapes only
    assert len(tensors) == 328
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == 20_821_295
    assert tensors[f"ups.0.{NEW[0]}"].shape == (512, 1, 1)
    assert tensors[f"ups.0.{NEW[1]}"].shape == (512, 256, 16)
    assert tensors["source_downs.0.weight"].shape == (256, 18, 30)


def test_a_file_of_another_size_is_one_error():
    theirs = official()
    del theirs["conv_post.bias"]
    half = theirs.pop(f"ups.0.{NEW[0]}")
    theirs["f0_predictor.classifier.weight"] = np.zeros((1, 25), np.float32)
    with pytest.raises(UserError) as caught:
        load(theirs)
    said = str(caught.value)
    assert half.shape == (32, 1, 1)
    assert "2 missing" in said
    assert "conv_post.bias" in said
    assert f"1 left over: ups.0.{NEW[1]}" in said
    assert "f0_predictor.classifier.weight is [1 25] and must be [1 24]" in said


def test_rules_are_for_models_that_count_from_zero():
    with pytest.raises(ValueError, match="official weights count from 0"):
        hift_rules(small_config(mel_origin=-6.0))
