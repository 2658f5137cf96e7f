"""Sizes that do not fit one another are one clear line; the official ones fit."""

import dataclasses

import pytest

from cv2jax.config import UserError
from cv2jax.models.hift_vocoder.config import HiftTrainingConfig, HiftVocoderConfig
from tests.models.golden_hift import GOLDEN_CONFIG, small_config


def test_the_official_sizes_fit():
    config = HiftVocoderConfig()
    config.validate()
    GOLDEN_CONFIG.validate()
    small_config().validate()
    HiftTrainingConfig().validate()
    assert config.frame_rate_hz == 50
    assert hash(config) == hash(HiftVocoderConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({name: 0}, rf"model\.generator\.{name}=0: must be positive")
            for name in ("num_mels", "rate_hz", "mel_fft", "mel_hop", "width", "num_harmonics", "f0_width", "istft_hop")
        ),
        *(
            ({name: 0.0}, rf"model\.generator\.{name}=0\.0: must be positive")
            for name in ("mel_fmax_hz", "sine_amplitude", "noise_amplitude", "max_magnitude", "max_amplitude")
        ),
        ({"sine_amplitude": -0.1}, r"sine_amplitude=-0\.1: must be positive"),
        ({"upsample_rates": (8, 15)}, "upsample_rates has 2 stages, upsample_kernels 3, source_kernels 3"),
        ({"upsample_kernels": (16, 11)}, "upsample_rates has 3 stages, upsample_kernels 2"),
        ({"source_kernels": (7, 7)}, "source_kernels 2: give as many of each"),
        ({"width": 36}, r"width=36: is halved 3 times; give a multiple of 8"),
        (
            {"upsample_kernels": (16, 11, 8)},
            r"upsample_kernels=\(16, 11, 8\): each must exceed its rate by an even number",
        ),
        ({"upsample_kernels": (6, 11, 7)}, "each must exceed its rate by an even number"),
        ({"block_kernels": (3, 4)}, "kernel 4 of a residual block: must be odd"),
        ({"source_kernels": (7, 7, 0)}, "kernel 0 of a residual block: must be odd"),
        ({"source_kernels": (7, 7, -1)}, "kernel -1 of a residual block: must be odd"),
        ({"block_kernels": ()}, "block_kernels, dilations: give some, all positive"),
        ({"dilations": ()}, "block_kernels, dilations: give some"),
        ({"dilations": (1, 0)}, "block_kernels, dilations: give some"),
        ({"istft_points": 20}, "istft_points=20: must be 4 · istft_hop=4"),
        ({"mel_hop": 240}, "upsample_rates, istft_hop: make 480 samples of mel_hop=240"),
        ({"rate_hz": 24001}, "mel_hop=480: must divide rate_hz=24001"),
        (
            {"upsample_rates": (5, 5, 3), "upsample_kernels": (5, 5, 3), "mel_hop": 300},
            "mel_hop=300: must divide rate_hz=24000 and be a multiple of 8",
        ),
        (
            {"upsample_rates": (4,), "upsample_kernels": (4,), "source_kernels": (3,), "mel_hop": 16},
            "mel_hop=16: must exceed istft_points=16",
        ),
        ({"upsampling_unit": 3.0}, r"upsampling_unit=3\.0: must be a power of two"),
        ({"upsampling_unit": 0.0}, r"upsampling_unit=0\.0: must be a power of two"),
        ({"f0_look_ahead": 6}, r"f0_look_ahead=6: must lie in 0 … 5"),
        ({"f0_look_ahead": -1}, r"f0_look_ahead=-1: must lie in 0 … 5"),
    ],
)
def test_a_generator_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        dataclasses.replace(HiftVocoderConfig(), **changes).validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window_frames": 0}, r"model\.window_frames=0: must be positive"),
        ({"windows_per_utterance": 0}, r"model\.windows_per_utterance=0: must be positive"),
        ({"discriminator_learning_rate": 0.0}, r"model\.discriminator_learning_rate=0\.0: must be positive"),
        ({"adversarial_from": -1}, r"model\.adversarial_from=-1: must not be negative"),
        *(
            ({name: -0.5}, rf"model\.{name}=-0\.5: must not be negative")
            for name in ("mel_weight", "feature_weight", "tpr_weight", "f0_weight", "stft_weight")
        ),
        ({"target_f0_share": 1.5}, r"model\.target_f0_share=1\.5: must lie in \[0, 1\]"),
        ({"target_f0_share": -0.5}, r"model\.target_f0_share=-0\.5"),
    ],
)
def test_a_training_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(HiftTrainingConfig(), **changes).validate()


def test_weights_of_nothing_are_fine():
    none = dict.fromkeys(("mel_weight", "feature_weight", "tpr_weight", "f0_weight", "stft_weight"), 0.0)
    config = HiftTrainingConfig(**none, target_f0_share=1.0)
    config.validate()
    assert config.mel_weight == 0
