"""Low-rank adaptation (Hu et al. 2021) as a filter over the parameters of any model.

A kernel W of (inputs…, outputs…) gets factors a (inputs…, r) and b (r, outputs…), and acts as W + alpha / r · a @ b. The
factors lie beside the model's own parameters under `lora`, in a tree of the same paths, so that one set of parameters,
one checkpoint and one table of shardings serve both. Kernels of scanned layers have their layers in front, in all three.
"""

import fnmatch
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from safetensors.numpy import load_file, save

from cv2jax.config import LoraConfig, UserError, differences, from_dict, to_dict
from cv2jax.parallel.distributed import to_host
from cv2jax.parallel.sharding import replicated
from cv2jax.train.disk import full_disk_reported
from cv2jax.train.hashes import batch_hash
from cv2jax.train.state import IsTrained, combine, partition

LORA = "lora"  # the branch of the parameters that holds the factors
_FORMAT = "cv2jax-lora-1"  # the only key of a side file's metadata: of several the order is not kept

# (path, logical axes without the layers) → how many leading axes are inputs.
CountInputs = Callable[[str, tuple[str | None, ...]], int]


def count_inputs(path: str, axes: tuple[str | None, ...]) -> int:
    """How many leading axes of a kernel are inputs, by their names: the residual stream `embed` is a side of its own.

    Two axes are an input and an output; of more, a first `embed` is the only input, a last one the only output. Raises
    ValueError for other kernels: give `init_lora` a rule of your own.
    """
    if len(axes) == 2 or (len(axes) > 2 and axes[0] == "embed" != axes[-1]):
        return 1
    if len(axes) > 2 and axes[-1] == "embed":
        return len(axes) - 1
    raise ValueError(f"{path}: which of its axes {axes} are inputs? give init_lora a count_inputs that knows")


def init_lora(
    params: Any, config: LoraConfig, key: Key[Array, ""], count_inputs: CountInputs = count_inputs
) -> dict[str, Any]:
    """Boxed fp32 factors {…: {kernel: {a, b}}} of all kernels that config names; b is 0, so nothing changes yet.

    `params` are boxed; the factors keep the logical axes of their kernels and shard as they do. Raises UserError for a
    name in `config.targets` or `config.also_trained` that fits no parameter (all of them in one line).
    """
    leaves = dict(_leaves(params))
    kernels = [path for path in leaves if _is_kernel(path)]
    unknown = [
        f"lora.{field}: '{name}' fits no {what}"
        for field, what, paths in (("targets", "kernel", kernels), ("also_trained", "parameter", list(leaves)))
        for name in getattr(config, field)
        if not any(_named(path, (name,)) for path in paths)
    ]
    if unknown:
        raise UserError(f"{'; '.join(unknown)}; the kernels are {', '.join(kernels)}")
    lora: dict[str, Any] = {}
    for path in _targets(leaves, config):
        # From the path alone: other targets leave this one's draw as it is.
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        lora = combine(lora, _nested(path, _init_factors(path, leaves[path], config.rank, path_key, count_inputs)))
    return lora


def _init_factors(path: str, kernel: Any, rank: int, key: Key[Array, ""], count_inputs: CountInputs) -> dict[str, Any]:
    shape, axes = tuple(kernel.unbox().shape), tuple(kernel.names)
    stacked = int(axes[0] == "layers")
    inputs = stacked + count_inputs(path, axes[stacked:])
    std = math.prod(shape[stacked:inputs]) ** -0.5
    a = nn.with_logical_partitioning(nn.initializers.normal(std), (*axes[:inputs], None))
    b = nn.with_logical_partitioning(nn.initializers.zeros, (*axes[:stacked], None, *axes[inputs:]))
    return {
        "a": a(key, (*shape[:inputs], rank), jnp.float32),
        "b": b(key, (*shape[:stacked], rank, *shape[inputs:]), jnp.float32),
    }


def add_lora(params: Any, config: LoraConfig, key: Key[Array, ""], count_inputs: CountInputs = count_inputs) -> Any:
    """The boxed parameters with factors under LORA; as they are where config is off. Errors as `init_lora`."""
    return params | {LORA: init_lora(params, config, key, count_inputs)} if config.rank else params


def trained_by(config: LoraConfig) -> IsTrained | None:
    """What `init_train_state` and `make_train_step` train: factors and `config.also_trained`; None (all) where it is off."""
    if not config.rank:
        return None
    return lambda path: path.startswith(f"{LORA}/") or _named(path, config.also_trained)


def merge_lora(params: Any, lora: Any, config: LoraConfig) -> Any:
    """The model's own parameters with alpha / r · a @ b added to each adapted kernel, fp32 products, dtypes kept.

    Inside a train step these are the effective parameters, through which the gradient reaches the factors; done once, they
    are those of a plain model.
    """

    def merge(params: Any, lora: Any) -> Any:
        if not isinstance(params, dict):
            return (params + config.alpha / config.rank * _product(params, **lora)).astype(params.dtype)
        return params | {name: merge(params[name], part) for name, part in lora.items()}

    return merge(params, lora)


def effective_params(params: Any, config: LoraConfig) -> Any:
    """`merge_lora` of what `add_lora` made: the plain model's parameters, whether config is on or off."""
    if not config.rank:
        return params
    return merge_lora({name: part for name, part in params.items() if name != LORA}, params[LORA], config)


def _product(kernel: Float[Array, "..."], a: Float[Array, "... r"], b: Float[Array, "..."]) -> Float[Array, "..."]:
    product = lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest")  # noqa: E731
    for _ in range(_num_stacked(kernel, a, b)):
        product = jax.vmap(product)
    return product(a, b)


def _num_stacked(kernel: Any, a: Any, b: Any) -> int:
    """Axes of layers in front: of (n + i + o) axes of the kernel, a has n + i + 1 and b has n + 1 + o."""
    return a.ndim + b.ndim - 2 - kernel.ndim


def hash_frozen(params: Any, config: LoraConfig) -> str:
    """Eight hex digits of the parameters that config freezes, equal on any mesh and with or without factors in them."""
    _, frozen = partition(params, trained_by(config))
    return f"{int(jax.jit(batch_hash)(dict(_leaves(frozen)))):08x}"


def save_lora(path: pathlib.Path, params: Any, config: LoraConfig) -> None:
    """Writes what is trained (factors and `also_trained`) as a safetensors file that names config and base; atomic.

    `params` are unboxed, with factors. Every process calls it, the first one writes.
    """
    trained, _ = partition(params, trained_by(config))
    mesh = getattr(jax.tree.leaves(trained)[0].sharding, "mesh", None)
    if isinstance(mesh, Mesh):  # of a pod no process could read the others' parts
        trained = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(trained)
    about = {"config": to_dict(config), "base": hash_frozen(params, config)}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in to_host(dict(_leaves(trained))).items()}
    if jax.process_index() > 0:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with full_disk_reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(tensors, {_FORMAT: json.dumps(about)}))
        temporary.replace(path)


def load_lora(path: pathlib.Path, params: Any, config: LoraConfig | None = None) -> tuple[Any, LoraConfig]:
    """(params with the factors and the other trained parameters of a side file, its config).

    `params` are unboxed: the base model, or what `add_lora` made of it, whose shardings the values then take. Raises
    UserError, with all that differs in one line, for a file of another base, of another config where one is given, or
    whose tensors do not fit; and for a file that is none.
    """
    tensors, about = _read(path)
    saved = from_dict(LoraConfig, about["config"])
    leaves = dict(_leaves(params))
    errors = differences(to_dict(saved), to_dict(config), "lora.") if config else []
    if not errors and (here := hash_frozen(params, saved)) != about["base"]:
        errors.append(f"base: {about['base']} in the file, {here} here")
    errors += _misfits(tensors, leaves, saved)
    if errors:
        raise UserError(f"{path} does not fit: {'; '.join(errors)}; give the base and config that it was trained with")
    for name, value in tensors.items():
        old = leaves.get(name)
        params = combine(
            params, _nested(name, jnp.asarray(value) if old is None else jax.device_put(value, old.sharding))
        )
    return params, saved


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    mend = "give a file that `cv2jax export --to lora` wrote"
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {mend}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); {mend}") from error
    if _FORMAT not in metadata:
        raise UserError(f"{path} holds no factors of this version ({_FORMAT}); {mend}")
    return tensors, json.loads(metadata[_FORMAT])


def _misfits(tensors: dict[str, np.ndarray], leaves: dict[str, Any], config: LoraConfig) -> list[str]:
    """What a side file lacks, has too much or in another shape, for a model of these parameters."""
    base = {path: leaf for path, leaf in leaves.items() if not path.startswith(f"{LORA}/")}
    wanted = {path for path in base if _named(path, config.also_trained)}
    errors = [
        f"{path}: {tensors[path].shape} in the file, {base[path].shape} here"
        for path in sorted(wanted & set(tensors))
        if tensors[path].shape != base[path].shape
    ]
    for path in _targets(base, config):
        factors = [f"{LORA}/{path}/{name}" for name in "ab"]
        wanted.update(factors)
        if set(factors) <= set(tensors):
            kernel, (a, b) = base[path], (tensors[name] for name in factors)
            stacked = _num_stacked(kernel, a, b)
            layers, inputs = kernel.shape[: max(stacked, 0)], kernel.shape[: a.ndim - 1]
            rest = (*layers, config.rank, *kernel.shape[a.ndim - 1 :])
            if stacked not in (0, 1) or a.shape != (*inputs, config.rank) or b.shape != rest:
                errors.append(f"{path}: factors {a.shape} and {b.shape} in the file, kernel {kernel.shape} here")
    errors += [f"{path}: not in the file" for path in sorted(wanted - set(tensors))]
    return errors + [f"{path}: only in the file" for path in sorted(set(tensors) - wanted)]


def _targets(leaves: dict[str, Any], config: LoraConfig) -> list[str]:
    return [path for path in sorted(leaves) if _is_kernel(path) and _named(path, config.targets)]


def _is_kernel(path: str) -> bool:
    return path.endswith("kernel")


def _named(path: str, names: tuple[str, ...]) -> bool:
    """Whether a name is a glob of the path's end, of a kernel's also without `/kernel`."""
    ends = [f"/{path}", f"/{path}".removesuffix("/kernel")]
    return any(fnmatch.fnmatchcase(end, f"*/{name}") for end in ends for name in names)


def _leaves(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _nested(path: str, value: Any) -> Any:
    for name in reversed(path.split("/")):
        value = {name: value}
    return value
