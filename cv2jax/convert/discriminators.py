"""The table of the discriminators in a GAN training's state dict (spec/official.md 8.3), over folded kernels.

Read it through `weight_norm.FoldedReader`, write it through `weight_norm.unfold_tensors(…, weight_norm_style)`.
"""

from cv2jax.convert.rules import Rule
from cv2jax.convert.weight_norm import NEW, OLD, Pair

PREFIX = "discriminator."
_OVER_TIME, _OVER_BINS = "o i k 1 -> k i o", "o i f k -> f k i o"


def discriminator_rules(prefix: str = PREFIX) -> tuple[Rule, ...]:
    """Every tensor of `MultipleDiscriminator`, folded, and its place in the parameters of `Discriminators`."""
    return period_rules(f"{prefix}mpd.") + spectral_rules(f"{prefix}mrd.")


def period_rules(prefix: str) -> tuple[Rule, ...]:
    """Of `MultiPeriodDiscriminator` alone."""
    theirs, ours = f"{prefix}discriminators.{{judge}}.", "period[{judge}]/"
    return (
        *_conv(f"{theirs}convs.{{layer}}", f"{ours}convs[{{layer}}]", _OVER_TIME),
        *_conv(f"{theirs}conv_post", f"{ours}out", _OVER_TIME),
    )


def spectral_rules(prefix: str) -> tuple[Rule, ...]:
    """Of `MultiResSpecDiscriminator` alone."""
    theirs, ours = f"{prefix}discriminators.{{judge}}.", "spectral[{judge}]/"
    return (
        *_conv(f"{theirs}discriminators.{{layer}}", f"{ours}convs[{{layer}}]", _OVER_BINS),
        *_conv(f"{theirs}out", f"{ours}out", _OVER_BINS),
    )


def weight_norm_style(name: str) -> Pair | None:
    """How upstream names the pair of a kernel: every one is normalised, by either of torch's two ways."""
    return OLD if "mpd." in name else NEW


def _conv(theirs: str, ours: str, axes: str) -> tuple[Rule, Rule]:
    kernel = Rule(foreign=f"{theirs}.weight", ours=f"{ours}/kernel", axes=axes)
    return kernel, Rule(foreign=f"{theirs}.bias", ours=f"{ours}/bias")
