"""Each impossible value is a UserError that names the field, its value and the mend."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from cv2jax.config import UserError
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig, base, official, tiny
from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS, init_params


@pytest.mark.parametrize("make", [tiny, base, official, SpeechTokenizerConfig])
def test_presets_are_valid_and_hashable(make):
    make().validate()
    assert hash(make()) == hash(make())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("width", 127),
        ("width", 6),
        ("num_heads", 3),
        ("num_layers", 0),
        ("fsmn_kernel", 30),
        ("rope_theta", 0.0),
        ("vocabulary_size", 4),
        ("quantizer", "lfq"),
        ("fsq_dim", 20),
        ("dtype", "float16"),
        ("remat", "some"),
        ("dropout", 1.0),
        ("label_smoothing", -0.1),
        ("ctc_weight", -1.0),
        ("max_freq_bins", 129),
        ("max_time_share", 1.5),
        ("vq_decay", 1.0),
    ],
)
def test_bad_values_are_named(field, value):
    config = tiny()
    object.__setattr__(config, field, value)  # past the type checker of the test run, which an installation has not
    with pytest.raises(UserError) as error:
        config.validate()
    message = str(error.value)
    assert message.startswith("model.")
    assert "\n" not in message
    assert field in message or field == "num_heads"
    assert str(value) in message


def test_number_of_codes():
    assert tiny().num_codes == 6561
    assert dataclasses.replace(tiny(), quantizer="vq").num_codes == 4096
    assert dataclasses.replace(tiny(), quantizer="none").num_codes == 1


def test_official_front_half_has_the_released_number_of_parameters():
    """123,714,568 parameters in the released tokenizer (spec/frontends.md 1.4)."""
    params = nn.unbox(jax.eval_shape(lambda: init_params(official(), jax.random.key(0))))
    assert sum(leaf.size for part in ENCODING_PARTS for leaf in jax.tree.leaves(params[part])) == 123_714_568
