"""Weight-normalised pairs folded into kernels and back, through the rule engine, from and to both of torch's namings."""

import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.discriminators import discriminator_rules, spectral_rules, weight_norm_style
from cv2jax.convert.rules import ForeignTensor, Reader, foreign_tensors, load_tree
from cv2jax.convert.weight_norm import NEW, OLD, FoldedReader, fold, unfold, unfold_tensors
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig
from tests.models.golden_discriminators import GOLDENS, SMALL, SPECTRAL, abstract_params, random_params, spectral_params


class DictReader:
    """Tensors of a dictionary; notes how much was read."""

    place = "a dictionary"

    def __init__(self, tensors):
        self.tensors, self.num_read = tensors, 0

    def names(self):
        return {name: (array.shape, array.dtype) for name, array in self.tensors.items()}

    def read(self, name, index):
        block = self.tensors[name][index]
        self.num_read += block.size
        return block


def values(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [(6, 3, 5), (4, 7), (5, 2, 3, 9), (3,)])
def test_a_folded_pair_has_the_gains_as_norms(shape):
    rng = np.random.default_rng(0)
    v = rng.standard_normal(shape).astype(np.float32)
    g = rng.standard_normal((shape[0], *(1 for _ in shape[1:]))).astype(np.float32)
    kernel = fold(g, v)
    assert kernel.dtype == np.float32
    norms = np.linalg.norm(kernel.reshape(shape[0], -1), axis=1)
    np.testing.assert_allclose(norms, np.abs(g).ravel(), rtol=1e-6)
    np.testing.assert_array_equal(np.sign(kernel), np.sign(v * g))
    np.testing.assert_allclose(fold(g, 7 * v), kernel, rtol=1e-6)


def test_what_is_unfolded_folds_to_what_it_was():
    kernel = np.random.default_rng(1).standard_normal((8, 3, 5)).astype(np.float32)
    kernel[2] = 0
    g, v = unfold(kernel)
    assert g.shape == (8, 1, 1)
    np.testing.assert_array_equal(np.delete(v, 2, 0), np.delete(kernel, 2, 0))
    np.testing.assert_allclose(fold(g, v), kernel, rtol=1e-7)
    assert (v[2] == 1).all()  # torch would make NaN of 0 / ‖0‖
    assert g[2] == 0
    np.testing.assert_array_equal(fold(np.ones((1, 1), np.float32), np.zeros((1, 4), np.float32)), np.zeros((1, 4)))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_a_short_pair_is_folded_in_fp32_as_the_official_loader_does(dtype):
    rng = np.random.default_rng(2)
    v, g = (rng.standard_normal(shape).astype(dtype) for shape in ((6, 3, 5), (6, 1, 1)))
    reader = FoldedReader(DictReader({"a.weight_v": v, "a.weight_g": g}))
    assert reader.names()["a.weight"] == ((6, 3, 5), np.float32)
    kernel = reader.read("a.weight", (slice(None),) * 3)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, fold(g.astype(np.float32), v.astype(np.float32)))
    assert not np.array_equal(kernel, kernel.astype(dtype).astype(np.float32))


def test_the_golden_discriminators_make_the_whole_trip():
    original = dict(np.load(GOLDENS / "mrd_weights.npz"))
    params = spectral_params()
    written = values(unfold_tensors(foreign_tensors(spectral_rules(""), params, "ours"), weight_norm_style))
    assert written.keys() == original.keys()
    assert all(written[name].shape == original[name].shape for name in original)
    for name in original:
        if name.endswith("bias"):
            np.testing.assert_array_equal(written[name], original[name])
        elif name.endswith(NEW[0]):
            np.testing.assert_allclose(np.abs(written[name]), np.abs(original[name]), rtol=1e-6)
    back = load_tree(spectral_rules(""), FoldedReader(DictReader(written)), abstract_params(SPECTRAL))
    for judge, layers in params.items():
        for name, layer in layers.items():
            np.testing.assert_allclose(back[judge][name]["kernel"], layer["kernel"], rtol=1e-6, err_msg=judge)


def test_all_discriminators_have_the_official_names():
    params = random_params(SMALL)
    written = unfold_tensors(foreign_tensors(discriminator_rules(), params, "ours"), weight_norm_style)
    at = "discriminator."
    shapes = {name: tensor.shape for name, tensor in written.items()}
    assert shapes[f"{at}mpd.discriminators.1.convs.1.weight_v"] == (6, 4, 5, 1)
    assert shapes[f"{at}mpd.discriminators.1.convs.1.weight_g"] == (6, 1, 1, 1)
    assert shapes[f"{at}mpd.discriminators.0.conv_post.weight_v"] == (1, 8, 3, 1)
    assert shapes[f"{at}mrd.discriminators.1.discriminators.0.parametrizations.weight.original1"] == (4, 1, 3, 9)
    assert shapes[f"{at}mrd.discriminators.0.out.bias"] == (1,)
    num_layers = 2 * (3 + 1) + 2 * (5 + 1)
    assert len(written) == 3 * num_layers
    read = FoldedReader(DictReader(values(written)))
    back = load_tree(discriminator_rules(), read, abstract_params(SMALL))
    np.testing.assert_allclose(
        back["period_1"]["convs_1"]["kernel"], params["period_1"]["convs_1"]["kernel"], rtol=1e-6
    )


def test_the_official_size_has_the_official_number_of_tensors():
    abstract = abstract_params(DiscriminatorConfig())
    zeros = {
        judge: {
            layer: {part: np.broadcast_to(np.float32(0), leaf.shape) for part, leaf in parts.items()}
            for layer, parts in layers.items()
        }
        for judge, layers in abstract.items()
    }
    written = unfold_tensors(foreign_tensors(discriminator_rules(), zeros, "ours"), weight_norm_style)
    assert len(written) == 144
    assert sum(int(np.prod(tensor.shape)) for tensor in written.values()) == 41_386_672


@pytest.mark.parametrize("style", [OLD, NEW])
def test_only_the_rows_that_are_wanted_are_read(style):
    rng = np.random.default_rng(2)
    g, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 1, 1), (8, 3, 5)))
    within = DictReader({f"a.{style[0]}": g, f"a.{style[1]}": v, "a.bias": np.zeros(8, np.float32)})
    reader = FoldedReader(within)
    assert isinstance(reader, Reader)
    assert reader.place == "a dictionary"
    assert reader.names() == {"a.weight": ((8, 3, 5), v.dtype), "a.bias": ((8,), np.dtype(np.float32))}
    block = reader.read("a.weight", (slice(2, 4), slice(1, 2), slice(None)))
    np.testing.assert_array_equal(block, fold(g, v)[2:4, 1:2])
    assert within.num_read == 2 * (1 + 15)
    assert reader.read("a.bias", (slice(0, 2),)).shape == (2,)


def test_half_a_pair_is_reported():
    reader = FoldedReader(DictReader({"mpd.discriminators.0.convs.0.weight_g": np.ones((4, 1, 1, 1), np.float32)}))
    assert list(reader.names()) == ["mpd.discriminators.0.convs.0.weight_g"]
    with pytest.raises(UserError, match=r"left over: mpd\.discriminators\.0\.convs\.0\.weight_g"):
        load_tree(discriminator_rules(""), reader, abstract_params(SMALL))


def test_tensors_without_weight_norm_stay_as_they_are():
    tensor = ForeignTensor(shape=(2, 2), read=lambda: np.eye(2, dtype=np.float32))
    plain = {"a.weight": tensor, "a.bias": tensor}
    assert unfold_tensors(plain, lambda name: None) == plain
    assert set(unfold_tensors(plain, lambda name: OLD)) == {"a.weight_g", "a.weight_v", "a.bias"}


def test_a_pair_that_still_folds_to_its_kernel_is_kept_and_another_is_made_anew():
    rng = np.random.default_rng(4)
    v, g = rng.standard_normal((5, 3, 2)).astype(np.float32), rng.random((5, 1, 1)).astype(np.float32)
    kept = FoldedReader(DictReader({f"a.{OLD[0]}": g, f"a.{OLD[1]}": v, "a.bias": g[:, 0, 0]}))
    for kernel, is_same in ((fold(g, v), True), (fold(g, v) + np.float32(1e-3), False)):
        tensors = {"a.weight": ForeignTensor(shape=v.shape, read=lambda kernel=kernel: kernel)}
        pair = values(unfold_tensors(tensors, lambda name: NEW, kept))
        assert set(pair) == {f"a.{NEW[0]}", f"a.{NEW[1]}"}
        assert np.array_equal(pair[f"a.{NEW[0]}"], g) == is_same
        assert np.array_equal(pair[f"a.{NEW[1]}"], v) == is_same
        np.testing.assert_allclose(fold(pair[f"a.{NEW[0]}"], pair[f"a.{NEW[1]}"]), kernel, rtol=3e-7)
    assert kept.pair("a.bias") is kept.pair("nothing") is None
