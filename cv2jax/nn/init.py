"""How tables start out: as torch does it, or so that speech tokens with common FSQ digits start alike."""

import math
from typing import Any

import jax
import jax.numpy as jnp

LEVELS = 3  # of an FSQ digit
# Share of the variance that codes have in common by their digits; the rest is each code's own.
SHARED = 0.9


def num_digits(num_speech_tokens: int) -> int:
    """How many FSQ digits the ids 0 … S - 1 have; 0 where S is no power of 3."""
    digits = round(math.log(num_speech_tokens, LEVELS))
    return digits if digits > 0 and LEVELS**digits == num_speech_tokens else 0


def uniform_within(bound: float) -> jax.nn.initializers.Initializer:
    """Uniform in [-bound, bound)."""

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def init_by_digits(own: jax.nn.initializers.Initializer, digits: int, axis: int) -> jax.nn.initializers.Initializer:
    """`own` for a table [S + stops, D] (axis 0) or [D, S + stops] (axis 1), of whose first 3^digits codes each is mostly
    the sum of a vector for each of its digits' values, at the same variance. Not upstream's: with an hour of speech, a code
    that was seen a dozen times learns from those that differ in a digit.
    """

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        own_key, shared_key = jax.random.split(key)
        table = own(own_key, shape, dtype, out_sharding)
        codes, width = jnp.arange(shape[axis]), shape[1 - axis]
        values = codes[:, None] // LEVELS ** jnp.arange(digits) % LEVELS
        onehot = jax.nn.one_hot(values, LEVELS, dtype=dtype).reshape(len(codes), digits * LEVELS)
        scale = jnp.std(table) * (SHARED / digits) ** 0.5
        vectors = jax.random.normal(shared_key, (digits * LEVELS, width), dtype) * scale
        is_code = (codes < LEVELS**digits)[:, None]
        mixed = jnp.where(is_code, onehot @ vectors, 0)
        keep = jnp.where(is_code, (1 - SHARED) ** 0.5, 1)
        return table * (keep if axis == 0 else keep.T) + (mixed if axis == 0 else mixed.T)

    return init
