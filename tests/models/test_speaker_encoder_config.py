"""What cannot be built or trained is refused in one line."""

import dataclasses

import pytest

from cv2jax.config import UserError, validate
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth": 0}, "model.growth=0: must be positive"),
        ({"crop_seconds": -1.0}, "model.crop_seconds=-1.0: must be positive"),
        ({"max_gain_db": -1.0}, "must not be negative"),
        ({"num_mels": 12}, "must be a multiple of 8"),
        ({"dilations": (1, 2)}, "give as many of each"),
        ({"block_layers": (), "dilations": ()}, "give as many of each"),
        ({"block_layers": (1, 0, 2)}, "give positive numbers"),
        ({"speeds": ()}, "model.speeds=\\(\\): give positive numbers"),
        ({"margin": 2.0}, "must lie in 0 … 1.5 radians"),
        ({"margin_start": 5, "margin_end": 3}, "must not lie before model.margin_start"),
        ({"noise_share": 1.5}, "must lie in 0 … 1"),
        ({"min_snr_db": 20.0}, "must not exceed model.max_snr_db"),
        ({"remat": "some"}, "model.remat=some: choose one of"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(SpeakerEncoderConfig(), **changes))


def test_the_default_is_the_released_model():
    config = SpeakerEncoderConfig()
    validate(config)
    assert (config.growth, config.bn_size, config.init_channels, config.embedding_dim) == (32, 4, 128, 192)
    assert (config.block_layers, config.dilations) == ((12, 24, 16), (1, 2, 2))
