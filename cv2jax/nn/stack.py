"""A stack of equal blocks: scanned or unrolled, rematerialised by a policy chosen by name."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

REMAT_POLICIES = {
    "none": None,  # keep every activation: no rematerialisation at all
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def apply_stack(
    block: type[nn.Module],
    fields: dict[str, Any],
    x: Float[Array, "B T D"],
    state: PyTree,
    *shared: PyTree,
    num_layers: int,
    deterministic: bool,
    remat: str = "none",
    scan: bool = True,
    name: str = "blocks",
    axis: str = "layers",
) -> tuple[Float[Array, "B T D"], PyTree]:
    """Applies `num_layers` copies of `block(**fields)`; call it inside an `nn.compact` method.

    A block is called as `block(x, state, deterministic, *shared) -> (x, state)`.

    Args:
      block: the module class. fields: its attributes, the same for every layer.
      x: [B, T, D], carried through. state: per-layer pytree (KV caches) stacked on axis 0, or None.
      *shared: arrays every layer sees (masks, rotary angles, encoder memory).
      num_layers: how many. deterministic: no dropout.
      remat: a key of REMAT_POLICIES. scan: one stacked parameter tree `name` and one compiled body,
        or separate trees `name_0`, `name_1`, …; the numbers are the same (`stack_layers` converts).
      axis: logical name of the stacked axis; another one inside a stack.

    Returns: (x, new state stacked like `state`). Raises ValueError for an unknown policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is unknown; known: {sorted(REMAT_POLICIES)}")
    if remat != "none":
        # Argument 3 is `deterministic` (self is 0). Inside a scan the loop already prevents the CSE that undoes remat.
        policy = REMAT_POLICIES[remat]
        block = nn.remat(block, prevent_cse=not scan, static_argnums=(3,), policy=policy)
    if scan:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            # A dropout key that is not split would drop the same units in every layer.
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast) + (nn.broadcast,) * len(shared),
            length=num_layers,
            metadata_params={nn.PARTITION_NAME: axis},
        )
        return scanned(**fields, name=name)(x, state, deterministic, *shared)
    states = []
    for i in range(num_layers):
        layer_state = jax.tree.map(lambda a, i=i: a[i], state)
        x, layer_state = block(**fields, name=f"{name}_{i}")(x, layer_state, deterministic, *shared)
        states.append(layer_state)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def stack_layers(params: dict[str, Any], name: str = "blocks") -> dict[str, Any]:
    """Turns the unrolled trees `name_0`, `name_1`, … of `params` into the scanned tree `name`, exactly."""
    layers = [params[key] for key in sorted((k for k in params if k.startswith(f"{name}_")), key=_layer_number)]
    rest = {key: value for key, value in params.items() if not key.startswith(f"{name}_")}
    return rest | {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: dict[str, Any], names: tuple[str, ...] = ("blocks",)) -> dict[str, Any]:
    """`stack_layers` back, of every scanned tree with one of the names, stacks inside stacks too."""
    made: dict[str, Any] = {}
    for key, value in params.items():
        if key in names:
            layers = range(jax.tree.leaves(value)[0].shape[0])
            parts = {f"{key}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in layers}
        else:
            parts = {key: value}
        made |= {name: unstack_layers(part, names) if isinstance(part, dict) else part for name, part in parts.items()}
    return made


def match_layers(params: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """`params` with each stack scanned or unrolled as in `like`, exactly; of `like` only the names count.

    Raises KeyError for a name of `like` that is in neither form of `params`.
    """
    made: dict[str, Any] = {}
    for key, wanted in like.items():
        inner = (
            (lambda part, wanted=wanted: match_layers(part, wanted)) if isinstance(wanted, dict) else lambda part: part
        )
        name, _, number = key.rpartition("_")
        if key in params:
            made[key] = inner(params[key])
        elif f"{key}_0" in params:
            layers = sorted((k for k in params if re.fullmatch(rf"{re.escape(key)}_\d+", k)), key=_layer_number)
            made[key] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(inner(params[k]) for k in layers))
        elif number.isdigit() and name in params:
            made[key] = inner(jax.tree.map(lambda leaf, i=int(number): leaf[i], params[name]))
        else:
            raise KeyError(key)
    return made


def _layer_number(key: str) -> int:
    return int(key.rsplit("_", 1)[1])
