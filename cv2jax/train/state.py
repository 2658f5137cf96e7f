"""What a run must remember: one pytree, saved whole, from which every sharding is derived."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

# Of a parameter's path, "encoder/blocks/query/kernel": whether it is trained.
IsTrained = Callable[[str], bool]


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` optimizer steps; the data order needs nothing but `step`.

    A new field, even an empty one, would keep Orbax from loading the checkpoints of before.
    """

    step: Any  # int32 scalar: optimizer steps taken, skipped ones included
    num_skipped: Any  # int32 scalar: steps whose loss or gradient was not finite
    params: Any
    opt_state: Any
    model_state: Any  # what is neither trained nor fixed: EMA codebooks, batch-norm statistics; {} if nothing


def init_train_state(
    params: Any, model_state: Any, optimizer: optax.GradientTransformation, is_trained: IsTrained | None = None
) -> TrainState:
    """The state at step 0; boxed (logically partitioned) parameters keep their axes in the optimizer's moments.

    Moments exist only for the parameters that `is_trained` names, None for all: give the train step the same.
    """
    zero = jnp.zeros((), jnp.int32)
    trained, _ = partition(params, is_trained)
    return TrainState(
        step=zero, num_skipped=zero, params=params, opt_state=optimizer.init(trained), model_state=model_state
    )


def make_state(init: Callable[[jax.Array], TrainState], shardings: Any, key: jax.Array) -> TrainState:
    """Runs `init(key)` straight into its shardings: no device ever holds an unsharded copy."""
    return jax.jit(lambda k: nn.unbox(init(k)), out_shardings=shardings)(key)


def restart(
    state: TrainState, params: Any, optimizer: optax.GradientTransformation, is_trained: IsTrained | None = None
) -> TrainState:
    """The state at step 0 with these of its parameters (a nested dict with some of them) replaced; donates both."""
    shardings = jax.tree.map(lambda a: a.sharding, state)
    init = jax.jit(
        lambda state: init_train_state(state.params, state.model_state, optimizer, is_trained),
        out_shardings=shardings,
        donate_argnums=0,  # else the whole state would be there twice
    )
    return init(dataclasses.replace(state, params=combine(state.params, params)))


def evaluation_params(state: TrainState) -> Any:
    """The moving average of the parameters where the optimizer keeps one, else the parameters themselves."""
    return combine(state.params, optax.tree.get(state.opt_state, "ema_params", {}))


def partition(params: Any, is_trained: IsTrained | None, prefix: str = "") -> tuple[Any, Any]:
    """(trained, frozen): the nested dict `params` cut in two by path, each without its empty branches."""
    if is_trained is None:
        return params, {}
    trained, frozen = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            parts = partition(value, is_trained, f"{prefix}{name}/")
        else:
            parts = (value, {}) if is_trained(prefix + name) else ({}, value)
        for tree, part in zip((trained, frozen), parts, strict=True):
            if not isinstance(part, dict) or part:
                tree[name] = part
    return trained, frozen


def combine(params: Any, other: Any) -> Any:
    """The union of two nested dicts; a leaf of both is `other`'s."""
    if not (isinstance(params, dict) and isinstance(other, dict)):
        return other
    return params | {name: combine(params[name], value) if name in params else value for name, value in other.items()}
