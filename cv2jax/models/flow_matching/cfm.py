"""Conditional flow matching along straight paths, and Euler's method with classifier-free guidance.

Source: Matcha-TTS and `flow/flow_matching.py` (spec/official.md 4.3), paper 2.4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree


def time_grid(num_steps: int) -> Float[np.ndarray, " steps_and_one"]:
    """1 − cos(π/2 · k / num_steps), k = 0 … num_steps: small steps first, where the path bends most."""
    return (1 - np.cos(np.linspace(0, 1, num_steps + 1) * np.pi / 2)).astype(np.float32)


def on_path(
    noise: Float[Array, "B F M"], mel: Float[Array, "B F M"], time: Float[Array, " B"], sigma_min: float
) -> tuple[Float[Array, "B F M"], Float[Array, "B F M"]]:
    """(place at `time`, velocity) on the optimal-transport path from noise to mel: (1 − (1 − σ)t)·noise + t·mel."""
    t = time[:, None, None]
    return (1 - (1 - sigma_min) * t) * noise + t * mel, mel - (1 - sigma_min) * noise


def velocity_error(predicted: Float[Array, "B F M"], wanted: Float[Array, "B F M"], kind: str) -> Float[Array, "B F"]:
    """Mean over the mel bins of |difference| ("l1", paper eq. 8) or of its square ("mse", the official code)."""
    difference = predicted.astype(jnp.float32) - wanted
    return jnp.mean(jnp.abs(difference) if kind == "l1" else jnp.square(difference), axis=-1)


def masked_mean(values: Float[Array, "B F"], mask: Bool[Array, "B F"]) -> Float[Array, ""]:
    """Mean of the values where mask is True; 0 over nothing."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def solve_euler(
    velocity: Callable[
        [Float[Array, "pairs F M"], Float[Array, " pairs"], PyTree, PyTree],
        tuple[Float[Array, "pairs F M"], PyTree, PyTree],
    ],
    start: Float[Array, "B F M"],
    *,
    num_steps: int,
    guidance: float,
    inputs: PyTree = None,
    carried: PyTree = None,
) -> tuple[Float[Array, "B F M"], PyTree, PyTree]:
    """(where the frames end, what `velocity` hands out at each step, stacked, what it carries on): Euler's method on
    `time_grid`, one loop.

    velocity(place, time, input, carried) → (velocity, output, carried) is asked for each row twice, the unconditioned rows
    behind the others. inputs: one a step, stacked on axis 0.
    """

    def step(state: tuple[Array, PyTree], now: tuple[Array, PyTree]) -> tuple[tuple[Array, PyTree], PyTree]:
        (x, carried), (times, given) = state, now
        both, output, carried = velocity(jnp.concatenate([x, x]), jnp.full((2 * x.shape[0],), times[0]), given, carried)
        return (x + (times[1] - times[0]) * guided(both, guidance), carried), output

    grid = time_grid(num_steps)
    times = jnp.stack([grid[:-1], grid[1:]], axis=1)
    (end, carried), outputs = jax.lax.scan(step, (start, carried), (times, inputs))
    return end, outputs, carried


def with_unconditioned(condition: Float[Array, "B ..."]) -> Float[Array, "pairs ..."]:
    """The rows, and behind them as many zeros: what the unconditioned network is told."""
    return jnp.concatenate([condition, jnp.zeros_like(condition)])


def guided(velocity: Float[Array, "pairs F M"], guidance: float) -> Float[Array, "B F M"]:
    """(1 + g) · the conditioned velocities − g · the unconditioned ones behind them."""
    conditioned, unconditioned = jnp.split(velocity, 2)
    return (1 + guidance) * conditioned - guidance * unconditioned
