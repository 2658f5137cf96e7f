"""The train step of two networks that play against each other, with the contract of `step.make_train_step`.

Parameters and optimizer states are dictionaries of `generator` and `discriminators`; a checkpoint holds both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cv2jax.parallel.sharding import constrain
from cv2jax.train.hashes import batch_hash
from cv2jax.train.state import TrainState, combine, init_train_state
from cv2jax.train.step import Batch, Metrics, StepFunction

GENERATOR, DISCRIMINATORS = "generator", "discriminators"

Waveform = Float[Array, "B W"]
# prepare(batch, key) → what the losses and the generator see of a batch
Prepare = Callable[[Batch, jax.Array], Batch]
# generate(params, batch, key) → (waveform, what else a loss looks at: a pytree of float arrays, None for nothing)
Generate = Callable[[Any, Batch, jax.Array], tuple[Waveform, Any]]
# spectral_loss(waveform, the rest, batch) → (scalar, metrics): all of the generator's loss that needs no discriminator
SpectralLoss = Callable[[Waveform, Any, Batch], tuple[jax.Array, Metrics]]
# loss(params of the discriminators, generated, real) → (scalar, metrics)
ContestLoss = Callable[[Any, Waveform, Waveform], tuple[jax.Array, Metrics]]


def gan_optimizer(
    generator: optax.GradientTransformation, discriminators: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Both optimizers as one, each for its own network: what `train.state.restart` needs to start a GAN's state anew."""
    both = {GENERATOR: generator, DISCRIMINATORS: discriminators}

    def init(params: Any) -> Any:
        return {name: optimizer.init(params[name]) for name, optimizer in both.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        done = {name: both[name].update(updates[name], state[name], params and params[name]) for name in both}
        return {name: pair[0] for name, pair in done.items()}, {name: pair[1] for name, pair in done.items()}

    return optax.GradientTransformation(init, update)


def init_gan_state(
    generator_params: Any,
    discriminator_params: Any,
    optimizer_generator: optax.GradientTransformation,
    optimizer_discriminators: optax.GradientTransformation,
) -> TrainState:
    """The state at step 0; boxed (logically partitioned) parameters keep their axes in the optimizers' moments."""
    params = {GENERATOR: generator_params, DISCRIMINATORS: discriminator_params}
    return init_train_state(params, {}, gan_optimizer(optimizer_generator, optimizer_discriminators))


def evaluation_generator(state: TrainState) -> Any:
    """The generator's moving average where its optimizer keeps one, else its parameters."""
    return combine(state.params[GENERATOR], optax.tree.get(state.opt_state[GENERATOR], "ema_params", {}))


def make_gan_step(
    *,
    prepare: Prepare = lambda batch, _: batch,
    generate: Generate,
    spectral_loss: SpectralLoss,
    discriminator_loss: ContestLoss,
    adversarial_loss: ContestLoss,
    real: Callable[[Batch], Waveform],
    optimizer_generator: optax.GradientTransformation,
    optimizer_discriminators: optax.GradientTransformation,
    adversarial_from: int = 0,
) -> StepFunction:
    """step(state, batch, key) → (state, metrics): pure, not yet compiled.

    As upstream (spec/official.md 5.6) the discriminators are updated first, on the wave as it is, then the generator
    against the new ones; the generator runs once. Unlike upstream each network's gradient is clipped by itself (Q31).
    The first `adversarial_from` steps are spectral only: the discriminators neither run nor change, nor does their
    optimizer count, and their metrics are 0. A step whose loss or gradient of either network is not finite changes
    nothing but the counters. `key` is folded with the step, so a resumed run draws what the unbroken one would have.

    Metrics: those of the three losses (scalars, but for `row_finite` [B]); `loss` and `grad_norm` of the generator,
    `discriminator_loss` and `discriminator_grad_norm`; `skipped`, `num_skipped`, `batch_hash`.
    """

    def contest(judges: Any, opt_state: Any, fake: Waveform, recorded: Waveform) -> tuple[Any, Any, Any]:
        graded = jax.value_and_grad(discriminator_loss, has_aux=True)
        (value, metrics), gradients = graded(judges, fake, recorded)
        updates, opt_state = optimizer_discriminators.update(gradients, opt_state, judges)
        judges = optax.apply_updates(judges, updates)
        judged = jax.value_and_grad(lambda wave: adversarial_loss(judges, _by_rows(wave), recorded), has_aux=True)
        (loss, more), slope = judged(fake)
        own = {"discriminator_loss": value, "discriminator_grad_norm": optax.tree.norm(gradients)}
        return judges, opt_state, (loss, slope, {**metrics, **more, **own})

    def rest(judges: Any, opt_state: Any, fake: Waveform, recorded: Waveform) -> tuple[Any, Any, Any]:
        *_, nothing = jax.eval_shape(contest, judges, opt_state, fake, recorded)
        return judges, opt_state, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nothing)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        generator, judges = state.params[GENERATOR], state.params[DISCRIMINATORS]
        prepare_key, generate_key = jax.random.split(jax.random.fold_in(key, state.step))
        ready = prepare(batch, prepare_key)
        (fake, others), pull_back = jax.vjp(lambda params: generate(params, ready, generate_key), generator)
        fake = _by_rows(fake)
        spectral = jax.value_and_grad(spectral_loss, argnums=(0, 1), has_aux=True)
        (loss, metrics), (slope, other_slopes) = spectral(fake, others, ready)
        players = (judges, state.opt_state[DISCRIMINATORS], fake, real(ready))
        if adversarial_from > 0:
            new_judges, judges_state, judged = jax.lax.cond(state.step >= adversarial_from, contest, rest, *players)
        else:
            new_judges, judges_state, judged = contest(*players)
        adversarial, adversarial_slope, contest_metrics = judged
        loss = loss + adversarial
        (gradients,) = pull_back((_by_rows(slope + adversarial_slope), other_slopes))
        updates, generator_state = optimizer_generator.update(gradients, state.opt_state[GENERATOR], generator)
        new = {GENERATOR: optax.apply_updates(generator, updates), DISCRIMINATORS: new_judges}
        metrics = {**metrics, **contest_metrics, "loss": loss, "grad_norm": optax.tree.norm(gradients)}
        own = ("loss", "grad_norm", "discriminator_loss", "discriminator_grad_norm")
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in own])))

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        opt_state = {GENERATOR: generator_state, DISCRIMINATORS: judges_state}
        new_state = TrainState(
            step=state.step + 1,
            num_skipped=state.num_skipped + jnp.where(finite, 0, 1),
            params=keep(new, state.params),
            opt_state=keep(opt_state, state.opt_state),
            model_state=state.model_state,
        )
        counted = {"skipped": ~finite, "num_skipped": new_state.num_skipped, "batch_hash": batch_hash(batch)}
        return new_state, {**metrics, **counted}

    return step


def _by_rows(wave: Waveform) -> Waveform:
    """The wave, and with it its gradient, split by rows alone on its way between the networks.

    Left to itself XLA may keep the gradient as partial sums over a split axis of a discriminator's kernel, and has then
    counted them twice in the generator's (jaxlib 0.10.2, three mesh axes of 2).
    """
    return constrain(wave, "batch", "length")
