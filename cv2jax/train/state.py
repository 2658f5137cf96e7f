"""What a run must remember: one pytree, saved whole, from which every sharding is derived."""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` optimizer steps; the data order needs nothing but `step`."""

    step: Any  # int32 scalar: optimizer steps taken, skipped ones included
    num_skipped: Any  # int32 scalar: steps whose loss or gradient was not finite
    params: Any
    opt_state: Any
    model_state: Any  # what is neither trained nor fixed: EMA codebooks, batch-norm statistics; {} if nothing


def init_train_state(params: Any, model_state: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0; boxed (logically partitioned) parameters keep their axes in the optimizer's moments."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, num_skipped=zero, params=params, opt_state=optimizer.init(params), model_state=model_state
    )


def make_state(init: Callable[[jax.Array], TrainState], shardings: Any, key: jax.Array) -> TrainState:
    """Runs `init(key)` straight into its shardings: no device ever holds an unsharded copy."""
    return jax.jit(lambda k: nn.unbox(init(k)), out_shardings=shardings)(key)
