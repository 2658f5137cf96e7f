"""The train step: gradient, finite check, update; compiled once for each batch shape, ahead of the first batch."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from cv2jax.parallel.sharding import axis_rules, batch_sharding, replicated
from cv2jax.train.hashes import batch_hash
from cv2jax.train.state import IsTrained, TrainState, combine, partition

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
BatchSpecs = dict[str, jax.ShapeDtypeStruct]


# loss(params, model_state, batch, key) → (scalar, (metrics, new model_state)). Metrics are scalars, but for `row_finite`
# [B] bool: which rows of the batch had a finite loss.
LossFunction = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Metrics, Any]]]
StepFunction = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, is_trained: IsTrained | None = None
) -> StepFunction:
    """step(state, batch, key) → (state, metrics): pure, not yet compiled.

    A step whose loss or gradient is not finite changes nothing but the counters; `key` is folded with the step, so a
    resumed run draws what the unbroken one would have drawn. Parameters that `is_trained` does not name (None: all are)
    have no gradient, do not count in its norm, and stay bit for bit.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        trained, frozen = partition(state.params, is_trained)

        def with_aux(trained: Any) -> tuple[jax.Array, Any]:
            params = combine(frozen, trained)
            return loss(params, state.model_state, batch, jax.random.fold_in(key, state.step))

        (value, (metrics, model_state)), gradients = jax.value_and_grad(with_aux, has_aux=True)(trained)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new_state = TrainState(
            step=state.step + 1,
            num_skipped=state.num_skipped + jnp.where(finite, 0, 1),
            params=combine(frozen, keep(optax.apply_updates(trained, updates), trained)),
            opt_state=keep(opt_state, state.opt_state),
            model_state=keep(model_state, state.model_state),
        )
        counted = {"skipped": ~finite, "num_skipped": new_state.num_skipped, "batch_hash": batch_hash(batch)}
        return new_state, {**metrics, "loss": value, "grad_norm": norm, **counted}

    return step


def batch_key(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Names the static shape of a batch."""
    return tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))


def abstract_batch(specs: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The specs of a global batch with their sharding over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for name, s in specs.items()}


def lower_step(
    step: StepFunction, abstract: TrainState, shardings: Any, specs: dict[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> jax.stages.Lowered:
    """Lowers a train step for one batch shape on a mesh of real, fake or described devices."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    rep = replicated(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, rep))
    with jax.set_mesh(mesh), axis_rules():
        return jitted.lower(abstract, abstract_batch(specs, mesh), jax.ShapeDtypeStruct((), key.dtype, sharding=rep))


def lower_evaluation(
    function: Callable[[Any, Any, Batch], Any],
    abstract: TrainState,
    specs: dict[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Lowers function(params, model_state, batch) for one batch shape; its results are whole on every device."""
    jitted = jax.jit(function, out_shardings=replicated(mesh))
    with jax.set_mesh(mesh), axis_rules():
        return jitted.lower(abstract.params, abstract.model_state, abstract_batch(specs, mesh))


class CompiledByShape:
    """One executable a batch shape, all compiled at construction; another shape is a programming error, never a retrace."""

    def __init__(
        self, what: str, lower: Callable[[BatchSpecs], jax.stages.Lowered], batch_specs: Sequence[BatchSpecs]
    ) -> None:
        started = time.monotonic()
        lowered = [lower(specs) for specs in batch_specs]
        # Compilation holds no lock of ours or Python's: shapes compile side by side, as many as there are cores.
        with concurrent.futures.ThreadPoolExecutor(max(1, min(len(lowered), os.cpu_count() or 1))) as pool:
            compiled = list(pool.map(lambda program: program.compile(), lowered))
        self._executables = dict(zip(map(batch_key, batch_specs), compiled, strict=True))
        peak = max(_device_mebibytes(program) for program in compiled)
        seconds = time.monotonic() - started
        logging.info("compiled %d shapes of %s in %.1f s, at most %.0f MiB a device", len(self), what, seconds, peak)

    def __len__(self) -> int:
        return len(self._executables)

    def for_batch(self, batch: Batch) -> jax.stages.Compiled:
        """The executable of a batch's shape."""
        return self._executables[batch_key(batch)]


def compile_steps(
    step: StepFunction, abstract: TrainState, shardings: Any, batch_specs: Sequence[BatchSpecs], mesh: Mesh
) -> CompiledByShape:
    """Compiles a train step for every batch shape; call `.for_batch(batch)(state, batch, key)`, which donates the state."""
    return CompiledByShape(
        "the train step", lambda specs: lower_step(step, abstract, shardings, specs, mesh), batch_specs
    )


def count_flops_by_shape(
    count_flops: Callable[..., float],
    step: StepFunction,
    abstract: TrainState,
    batch_specs: Sequence[BatchSpecs],
    mesh: Mesh,
) -> dict[tuple[Any, ...], float]:
    """batch_key → FLOPs of a step on the whole mesh, as `count_flops(step, state, batch, key)` says of the shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh), axis_rules():
        return {batch_key(specs): float(count_flops(step, abstract, specs, key)) for specs in batch_specs}


def _device_mebibytes(program: jax.stages.Compiled) -> float:
    memory = program.memory_analysis()
    return float("nan") if memory is None else (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20
