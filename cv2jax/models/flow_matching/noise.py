"""Where the solver starts: noise as a function of (key, frame), or the fixed buffer of the official code.

Frames of a prompt draw from the voice's key and count from its start, all others from the request's key and count from the
prompt's end: neither hops nor batch mates change a frame's noise, and a voice's prompt can be solved once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

OFFICIAL_FRAMES = 15000  # 300 s
_OF_PROMPT, _OF_REQUEST = 0xF0, 0xF1  # folded into keys: a request draws for other stages, and may have its voice's key
_LANES = 8  # Box-Muller of torch works on 16 numbers at a time


def frame_noise(
    voice_keys: Key[Array, " B"],
    request_keys: Key[Array, " B"],
    frames: Int[Array, "B F"],
    num_prompt: Int[Array, " B"],
    num_mels: int,
) -> Float[Array, "B F M"]:
    """Standard normal noise of each frame, which counts from the start of the prompt of `num_prompt` frames."""

    def draw(voice: Array, request: Array, frame: Array, prompt: Array) -> Array:
        own, other = jax.random.fold_in(voice, _OF_PROMPT), jax.random.fold_in(request, _OF_REQUEST)
        own, other = jax.random.fold_in(own, frame), jax.random.fold_in(other, frame - prompt)
        data = jnp.where(frame < prompt, jax.random.key_data(own), jax.random.key_data(other))
        return jax.random.normal(jax.random.wrap_key_data(data, impl=jax.random.key_impl(own)), (num_mels,))

    over_frames = jax.vmap(draw, in_axes=(None, None, 0, None))
    return jax.vmap(over_frames)(voice_keys, request_keys, frames, num_prompt)


@functools.lru_cache(maxsize=1)
def official_noise() -> Float[np.ndarray, "F 80"]:
    """`torch.manual_seed(0); torch.randn(1, 80, 15000)` as [15000, 80] (spec/official.md appendix C).

    The official code starts every request from it, frame 0 at the start of the prompt.
    """
    noise = _torch_normal(0, 80 * OFFICIAL_FRAMES).reshape(80, OFFICIAL_FRAMES).T.copy()
    noise.setflags(write=False)  # cached: nobody may change it
    return noise


def _torch_normal(seed: int, count: int) -> Float[np.ndarray, " count"]:
    """torch's normal numbers on a CPU after `manual_seed(seed)`; count is a multiple of 16."""
    generator = np.random.RandomState(seed)  # the same Mersenne twister, seeded in the same way
    words = generator.randint(0, 1 << 32, count, np.uint32)
    uniform = ((words & 0xFFFFFF) * np.float32(2**-24)).astype(np.float32).reshape(-1, 2, _LANES)
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).astype(np.float32)
