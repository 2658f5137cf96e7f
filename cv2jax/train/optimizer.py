"""Optimizers from `OptimizerConfig`, on optax."""

from typing import Any

import jax
import optax

from cv2jax.config import OptimizerConfig

DECAYED = ("kernel", "embedding")  # weight decay pulls matrices, never biases, norms or scales


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
    """Global-norm clip, then AdamW with decay on matrices only (decoupled, Loshchilov and Hutter 2019)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decay_mask,
        ),
    )


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(entry, "key", None) in DECAYED for entry in path), params
    )
