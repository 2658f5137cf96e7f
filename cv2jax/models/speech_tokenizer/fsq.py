"""Finite scalar quantisation with three levels a digit (spec/frontends.md 1.3; paper 2.2, eq. 2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.layers import Linear

LEVELS = 3  # K = 1: digits -1, 0, 1; eight of them make the 6,561 codes of CosyVoice 2
BOUND = 0.999  # (LEVELS - 1)/2 · (1 - 1e-3): keeps tanh off the rounding border
# The hidden vectors have no norm before the projection and a large common mean: at full scale most digits start where
# tanh is flat, and training collapses to a handful of codes (seen: 5 used after 500 steps; 200 and more at this scale).
INIT_SCALE = 0.3
# Standard deviation of a centred Gaussian z whose three digits are equally likely: atanh(0.5/0.999) / Φ⁻¹(2/3).
BALANCED_STD = 1.2768


def bound(z: Float[Array, "... Q"]) -> Float[Array, "... Q"]:
    """0.999·tanh(z): the projected value squeezed between the lowest and the highest digit."""
    return BOUND * jnp.tanh(z)


def round_straight_through(z: Float[Array, "... Q"]) -> Float[Array, "... Q"]:
    """Rounds half to even; the gradient passes as if nothing had been rounded."""
    return z + jax.lax.stop_gradient(jnp.round(z) - z)


def digits_to_ids(digits: Float[Array, "... Q"]) -> Int[Array, "..."]:
    """Sum of (digit + 1)·3^i, digit 0 least significant: digits in {-1, 0, 1} to ids in [0, 3^Q)."""
    basis = LEVELS ** jnp.arange(digits.shape[-1], dtype=jnp.int32)
    return jnp.sum((jnp.round(digits).astype(jnp.int32) + 1) * basis, axis=-1, dtype=jnp.int32)


def ids_to_digits(ids: Int[Array, "..."], num_digits: int) -> Float[Array, "... Q"]:
    """Inverse of `digits_to_ids`: (id // 3^i) % 3 - 1 (the paper's eq. 14 lacks the -1)."""
    basis = LEVELS ** jnp.arange(num_digits, dtype=jnp.int32)
    return ((ids[..., None] // basis) % LEVELS - 1).astype(jnp.float32)


def digit_balance_loss(z: Float[Array, "B L Q"], mask: Bool[Array, "B L"]) -> Float[Array, ""]:
    """Mean over the digits of KL(N(mean, variance of z over the True positions) ‖ N(0, BALANCED_STD²)); not in the paper.

    Recognition alone lets digits drift to where tanh is flat: their gradient vanishes, they stay on one level for good,
    and a run ends with a dozen codes. This pulls each digit's batch statistics, not its single values, back to where
    all three levels occur. 0 without a True position.
    """
    keep, total = mask[..., None], jnp.maximum(jnp.sum(mask), 1)
    z = jnp.where(keep, z, 0)
    mean = jnp.sum(z, axis=(0, 1)) / total
    variance = jnp.sum(jnp.where(keep, jnp.square(z - mean), 0), axis=(0, 1)) / total
    ratio = variance / BALANCED_STD**2 + 1e-6  # its logarithm is finite also for a digit that never moves
    divergence = ratio + jnp.square(mean / BALANCED_STD) - 1 - jnp.log(ratio)
    return jnp.where(jnp.any(mask), 0.5 * jnp.mean(divergence), 0.0)


class FiniteScalarQuantizer(nn.Module):
    """Projects hidden vectors to Q numbers and rounds each to one of three levels, in fp32 whatever the model's dtype.

    Attributes:
      width: D. num_digits: Q.
    """

    width: int
    num_digits: int

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L Q"], Float[Array, "B L Q"], Int[Array, "B L"]]:
        """Returns (z, the projection before tanh; digits with a straight-through gradient; ids int32)."""
        down = Linear(
            (self.width, self.num_digits),
            ("embed", None),
            precision="highest",
            init_scale=INIT_SCALE,
            name="project_down",
        )
        z = down(hidden.astype(jnp.float32))
        digits = round_straight_through(bound(z))
        return z, digits, digits_to_ids(jax.lax.stop_gradient(digits))
