"""Logical axes to mesh axes: few tables, strict about names, and every sharding derived from one abstract state.

A mesh says which table it goes by (`rules_of`): one of another table than RULES has a last axis of size 1 of its name, so
that whatever sees the mesh, a Pallas kernel inside a traced step too, splits arrays by the same table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen import spmd
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the batch is split over both: FSDP is data parallelism with the parameters split too

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
RULES: Rules = (
    # activations
    ("batch", BATCH_AXES),
    ("length", None),
    ("act_embed", None),
    ("act_mlp", "tensor"),
    ("act_heads", "tensor"),
    # parameters
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv", None),
    ("head_dim", None),
    ("vocab", "tensor"),
    ("codebook", "tensor"),
    ("layers", None),
    ("inner_layers", None),
    ("norm", None),
    ("conv", None),
)

# Parameters whole on every chip and the batch alone split: for models that are small beside a chip's memory.
REPLICATED: Rules = tuple((name, axes if name == "batch" else None) for name, axes in RULES)
# By the names of `MeshConfig.rules`; "hybrid" is the first one's on a mesh whose fsdp axis stays inside a slice or host.
TABLES: dict[str, Rules] = {"fsdp": RULES, "hybrid": RULES, "replicated": REPLICATED}


def rules_of(mesh: Mesh | AbstractMesh) -> Rules:
    """The table that a mesh of `make_mesh` goes by; RULES for no mesh and for one of other axes."""
    last = mesh.axis_names[-1] if mesh.axis_names else ""
    return TABLES.get(last, RULES)


def splits_parameters(mesh: Mesh) -> bool:
    """Whether a mesh means to cut parameters up: some may stay whole because their sizes do not divide."""
    return rules_of(mesh) is RULES and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to its logical axes; outside `axis_rules` a no-op; an unknown axis is an error."""
    if not spmd.get_logical_axis_rules():
        return x
    return spmd.with_logical_constraint(x, axes, fallback=spmd.RulesFallback.RAISE_ERROR)


def axis_rules() -> Any:
    """Context in which `constrain` acts, by the table of the mesh; enter it after `jax.set_mesh(mesh)`."""
    return nn.logical_axis_rules(rules_of(jax.sharding.get_abstract_mesh()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())


def platform() -> str:
    """The platform (cpu, gpu, tpu) of the mesh of `jax.set_mesh`, which may only be described, else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def computation_dtype(choice: str) -> str:
    """`choice`, or for "auto" what suits the default device: float32 on a CPU, else bfloat16."""
    if choice != "auto":
        return choice
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def map_local(
    function: Callable[..., jax.Array],
    args: Sequence[jax.Array],
    axes: Sequence[tuple[str | None, ...]],
    out_axes: tuple[str | None, ...],
) -> jax.Array:
    """function(*args) on each device's own part of the arrays: for kernels that XLA cannot split itself (Pallas).

    `axes` and `out_axes` are the logical axes of the arguments and of the result, split under the mesh of `jax.set_mesh`
    by its table; one that the mesh does not divide in every argument stays whole. Without a mesh a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*args)
    rules = dict(rules_of(mesh))
    sizes = [
        (name, n) for array, names in zip(args, axes, strict=True) for name, n in zip(names, array.shape, strict=True)
    ]
    whole = {name for name, size in sizes if name and size % _num_parts(mesh.shape, rules[name])}
    spec = lambda names: PartitionSpec(*(None if n is None or n in whole else rules[n] for n in names))  # noqa: E731
    in_specs = tuple(spec(names) for names in axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False)(*args)


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def num_batch_parts(sizes: Mapping[str, int], num_rows: int) -> int:
    """Into how many parts `map_local` cuts `num_rows` rows on a mesh of those axis sizes: 1 where they do not divide."""
    parts = _num_parts(sizes, BATCH_AXES)
    return parts if num_rows % parts == 0 else 1


def abstract_state(init: Callable[[jax.Array], Any], mesh: Mesh) -> tuple[Any, Any]:
    """(shapes with shardings, shardings) of the pytree `init(key)` makes, without making it.

    Call it outside `jax.set_mesh`: unboxing would constrain. Raises ValueError for a logical axis that has no rule. A
    dimension that its mesh axis does not divide is replicated: a head count or vocabulary of any size runs on any mesh.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    rules = rules_of(mesh)
    known = {name for name, _ in rules}
    used = {
        a for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec)) for a in s if a is not None
    }
    if used - known:
        raise ValueError(f"logical axes without a rule in parallel/sharding.py: {sorted(used - known)}")
    shapes = nn.unbox(boxed)
    shardings = jax.tree.map(
        lambda shape, sharding: _divisible(shape, sharding),
        shapes,
        nn.logical_to_mesh_sharding(specs, mesh, list(rules)),
    )
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings), shardings


def _divisible(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
    mesh, spec = sharding.mesh, []
    for size, axes in zip(array.shape, tuple(sharding.spec) + (None,) * array.ndim, strict=False):
        spec.append(axes if size % _num_parts(mesh.shape, axes) == 0 else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def _num_parts(sizes: Mapping[str, int], axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes[name] for name in names)
