"""The table of the S3 tokenizer: the official weights come in, and go out again bit for bit."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.rules import foreign_tensors, load_tree
from cv2jax.convert.speech_tokenizer import speech_tokenizer_rules
from cv2jax.models.speech_tokenizer.config import tiny
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params
from tests.models.golden_reader import WeightsReader
from tests.models.golden_weights import GOLDEN, load_golden

GoldenReader = functools.partial(WeightsReader, GOLDEN)


def abstract(**changes):
    config = dataclasses.replace(tiny(), **changes)
    return nn.unbox(jax.eval_shape(functools.partial(init_encoding_params, config), jax.random.key(0)))


def test_the_official_weights_are_those_that_the_encoder_is_tested_with():
    ours = load_tree(speech_tokenizer_rules(), GoldenReader(), abstract(scan_layers=False))
    want, _ = load_golden()
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, ours, want)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_what_comes_in_goes_out_bit_for_bit(scan):
    theirs = GoldenReader().arrays
    ours = load_tree(speech_tokenizer_rules(), GoldenReader(), abstract(scan_layers=scan))
    out = foreign_tensors(speech_tokenizer_rules(), ours, "the tokenizer")
    assert set(out) == set(theirs)
    for name, tensor in out.items():
        assert tensor.shape == theirs[name].shape
        np.testing.assert_array_equal(tensor.read(), theirs[name])


def test_another_depth_or_width_is_one_line():
    with pytest.raises(UserError, match=r"16 missing: encoder\.blocks\.2\.") as error:
        load_tree(speech_tokenizer_rules(), GoldenReader(), abstract(num_layers=3))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"mlp\.0\.weight is \[512 128\] and must be \[256 128\]"):
        load_tree(speech_tokenizer_rules(), GoldenReader(), abstract(mlp_ratio=2))
