"""The table of CAM++: the official weights come in, and go out again bit for bit."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.campplus import IGNORED, campplus_rules
from cv2jax.convert.rules import foreign_tensors, load_tree
from tests.models.golden_speaker import GOLDEN_CONFIG, SMALL_CONFIG, GoldenReader, abstract_tree, golden_tree


def test_what_comes_in_goes_out_bit_for_bit():
    theirs = GoldenReader().arrays
    ours = foreign_tensors(campplus_rules(), golden_tree(), "CAM++")
    counts = {name for name in theirs if name.endswith("num_batches_tracked")}
    assert set(ours) == set(theirs) - counts
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        np.testing.assert_array_equal(tensor.read(), theirs[name])


def test_statistics_are_no_parameters():
    tree = golden_tree()
    np.testing.assert_array_equal(
        tree["norms"]["dense_norm"]["mean"], GoldenReader().arrays["xvector.dense.nonlinear.batchnorm.running_mean"]
    )
    assert "dense_norm" not in tree["encoder"]  # it is not affine
    assert set(tree["encoder"]["tdnn_norm"]) == {"scale", "bias"}


def test_another_model_is_one_line():
    with pytest.raises(UserError, match="does not fit the model") as error:
        load_tree(campplus_rules(), GoldenReader(), abstract_tree(SMALL_CONFIG), ignored=IGNORED)
    assert "\n" not in str(error.value)
    reader = GoldenReader()
    del reader.arrays["xvector.block2.tdnnd3.linear1.weight"]
    with pytest.raises(UserError, match=r"1 missing: xvector.block2.tdnnd3.linear1.weight"):
        load_tree(campplus_rules(), reader, abstract_tree(GOLDEN_CONFIG), ignored=IGNORED)
