"""Rotary position embedding in the "rotate-half" layout of NeoX, Llama, Qwen2 and the S3 tokenizer."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions: Int[Array, "... T"], head_dim: int, theta: float) -> Float[Array, "... T C_half"]:
    """Rotation angles position · theta^(-2i/C), fp32; computed, not tabled, so there is no longest position."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return positions[..., None].astype(jnp.float32) * (1.0 / theta**exponents)


def apply_rope(x: Float[Array, "B T H C"], angles: Float[Array, "... T C_half"]) -> Float[Array, "B T H C"]:
    """Rotates the pairs (x[i], x[i + C/2]) by the angles, in fp32; returns the dtype of x.

    Equal to x·cos + cat(-x[C/2:], x[:C/2])·sin (spec/frontends.md 1.2).
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
