"""The table of the official `hift.pt`: F0 predictor, harmonic source and generator (spec/official.md 8.3), over folded kernels.

Read it through `weight_norm.FoldedReader`, write it through `weight_norm.unfold_tensors(…, weight_norm_style)`. The
generator of a GAN training's state dict has the same names behind `generator.`.
"""

from cv2jax.convert.rules import Rule
from cv2jax.convert.weight_norm import NEW, Pair
from cv2jax.models.hift_vocoder.config import F0_LAYERS, F0_UNIT_HZ, MEL_UNIT, HiftVocoderConfig

PREFIX = "generator."  # in a GAN training's file
_LINEAR, _CONV, _UPSAMPLING = "o i -> i o", "o i k -> k i o", "i o k -> k i o"
_PLAIN = ("m_source.", "source_downs.", "f0_predictor.classifier.")  # the modules without weight normalisation


def hift_rules(config: HiftVocoderConfig, prefix: str = "") -> tuple[Rule, ...]:
    """Every tensor of `HiFTGenerator`, folded, and its place in the parameters of `HiftVocoder`.

    Raises ValueError for a config that counts log-mel from elsewhere than 0: see `count_from_zero`.
    """
    if config.mel_origin:
        raise ValueError(f"mel_origin is {config.mel_origin:g}; official weights count from 0")
    rules = [
        *_affine(f"{prefix}m_source.l_linear", "source", _LINEAR),
        *_affine(f"{prefix}conv_pre", "generator/conv_in", _CONV, MEL_UNIT),
        *_affine(f"{prefix}conv_post", "generator/conv_out", _CONV),
        *_affine(f"{prefix}ups.{{stage}}", "generator/upsample[{stage}]", _UPSAMPLING, config.upsampling_unit),
        *_affine(f"{prefix}source_downs.{{stage}}", "generator/source_down[{stage}]", _CONV),
        *_block_rules(f"{prefix}source_resblocks.{{stage}}", "generator/source_block[{stage}]"),
        *_affine(f"{prefix}f0_predictor.classifier", "f0_predictor/out", _LINEAR, 1 / F0_UNIT_HZ, 1 / F0_UNIT_HZ),
    ]
    for i in range(F0_LAYERS):  # between them stand activations, which have numbers too
        rules += _affine(
            f"{prefix}f0_predictor.condnet.{2 * i}", f"f0_predictor/conv_{i}", _CONV, MEL_UNIT if i == 0 else 1.0
        )
    for stage in range(len(config.upsample_rates)):
        for j, kernel in enumerate(config.block_kernels):
            number = stage * len(config.block_kernels) + j
            rules += _block_rules(f"{prefix}resblocks.{number}", f"generator/block_{stage}_{kernel}")
    return tuple(rules)


def weight_norm_style(name: str) -> Pair | None:
    """How upstream names the pair of a kernel; None for those that are not normalised."""
    return None if name.removeprefix(PREFIX).startswith(_PLAIN) else NEW


def _affine(theirs: str, ours: str, axes: str, scale: float = 1.0, bias_scale: float = 1.0) -> tuple[Rule, Rule]:
    kernel = Rule(foreign=f"{theirs}.weight", ours=f"{ours}/kernel", axes=axes, scale=scale)
    return kernel, Rule(foreign=f"{theirs}.bias", ours=f"{ours}/bias", scale=bias_scale)


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    rules: list[Rule] = []
    for number, name in ((1, "dilated"), (2, "plain")):
        rules += _affine(f"{theirs}.convs{number}.{{layer}}", f"{ours}/{name}[{{layer}}]", _CONV)
        alpha = f"{theirs}.activations{number}.{{layer}}.alpha"
        rules.append(Rule(foreign=alpha, ours=f"{ours}/snake_{name}[{{layer}}]/alpha"))
    return rules
