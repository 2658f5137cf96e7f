"""Optimizers from `OptimizerConfig`, on optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cv2jax.config import OptimizerConfig

DECAYED = ("kernel", "embedding")  # ends of names: weight decay pulls matrices, never biases, norms or scales


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then a cosine over the remaining steps or a constant."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(config.learning_rate)
    else:
        decay_steps = max(num_steps - config.warmup_steps, 1)
        after = optax.cosine_decay_schedule(
            config.learning_rate, decay_steps, config.final_learning_rate / config.learning_rate
        )
    whole = optax.join_schedules([warmup, after], [config.warmup_steps])
    return lambda step: whole(step + 1)  # counted from 1: a rate of 0 would waste the first batch


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW with decay on matrices only (decoupled, Loshchilov and Hutter 2019).

    With `config.ema_decay` its state also holds a moving average of the parameters; see `evaluation_params`.
    """
    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decay_mask,
        ),
    ]
    if config.ema_decay:
        parts.append(average_params(config.ema_decay))
    return optax.chain(*parts)


class AverageState(NamedTuple):
    """State of `average_params`."""

    ema_params: Any  # fp32, of the shapes and shardings of the parameters


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps e ← decay · e + (1 - decay) · p of the updated parameters p, from their first values on.

    The last of a chain: it passes updates on and must see the final ones. In the optimizer's state, where a skipped step
    leaves it alone like the moments, and runs without it have the checkpoints that they always had.
    """

    def init(params: Any) -> AverageState:
        # Copies: the train step is donated its state, and cannot be given one buffer twice.
        return AverageState(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(new, state.ema_params, 1 - decay))

    return optax.GradientTransformation(init, update)


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(getattr(entry, "key", "")).endswith(DECAYED) for entry in path), params
    )
