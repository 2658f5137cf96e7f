"""A workdir as `cv2jax train` leaves it, of the small language model with random numbers everywhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.config import load_config, override
from cv2jax.tasks import make_task
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.run import save_or_compare
from tests.small_token_corpus import SMALL_LM


def make_run(workdir, corpus, *sets, steps=(5,), poison=False):
    """{step: state} of the checkpoints that the workdir holds."""
    config = override(load_config("text_speech_lm_tiny"), [f"data.corpus={corpus}", *SMALL_LM, *sets])
    task = make_task(config)
    shapes = nn.unbox(jax.eval_shape(task.init_state, jax.random.key(0)))
    states = {}
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step in steps:
            rng = np.random.default_rng(step)
            draw = lambda a: jnp.asarray(rng.normal(size=a.shape).astype(a.dtype))  # noqa: B023, E731
            states[step] = jax.tree.map(draw, shapes)
            if poison:
                states[step].params["text_embedding"] += np.nan
            checkpoints.save(step, states[step])
    task.keep(workdir)
    save_or_compare(workdir, config, task.facts(), started=False, write=True)
    return states
