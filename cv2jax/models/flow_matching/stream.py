"""The compiled functions of a flow's streams and whole solves, one of each for all masks and voices: those are data."""

import functools
from typing import Any

import jax

from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import FlowMatching, solve
from cv2jax.models.flow_matching.noise import frame_noise
from cv2jax.models.flow_matching.step import refill_state, step


@functools.cache
def step_program(config: FlowMatchingConfig) -> Any:
    """`step` of (params, state, hop); the state is donated."""
    return jax.jit(functools.partial(step, FlowMatching(config)), donate_argnums=1)


@functools.cache
def solve_program(config: FlowMatchingConfig) -> Any:
    """`solve` of (params, batch, noise, mask)."""
    return jax.jit(functools.partial(solve, FlowMatching(config)))


recycle = jax.jit(refill_state, donate_argnums=0)
draw_noise = jax.jit(frame_noise, static_argnums=4)
