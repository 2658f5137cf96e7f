"""The smallest GAN: a linear generator of waves, one linear discriminator, and a poisoned step on demand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cv2jax.config import MeshConfig, OptimizerConfig
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.gan_step import init_gan_state, make_gan_step
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps

ONE = MeshConfig(data=1)  # one device of the eight
WIDTH, SAMPLES, ROWS = 4, 48, 8
GENERATOR = OptimizerConfig(learning_rate=0.02, warmup_steps=2, clip_norm=0.5, ema_decay=0.75)
DISCRIMINATORS = OptimizerConfig(learning_rate=0.05, warmup_steps=1, clip_norm=2.0)
SPECS = [
    {
        "mel": jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32),
        "waveform": jax.ShapeDtypeStruct((ROWS, SAMPLES), np.float32),
    }
]


def optimizers(num_steps=20):
    return make_optimizer(GENERATOR, num_steps), make_optimizer(DISCRIMINATORS, num_steps)


def init_state(key):
    def kernel(key, shape):
        make = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("embed", "mlp"))
        return {"kernel": make(key, shape)}

    keys = jax.random.split(key, 2)
    return init_gan_state(
        {"wave": kernel(keys[0], (WIDTH, SAMPLES))}, {"judge": kernel(keys[1], (SAMPLES, 2))}, *optimizers()
    )


def generate(params, batch, key):
    """The noise makes a wrong key visible; the second output is one that only the spectral loss sees."""
    wave = batch["mel"] @ params["wave"]["kernel"]
    return wave + 0.1 * jax.random.normal(key, wave.shape), {"pitch": jnp.tanh(wave).mean(-1)}


def spectral_loss(wave, others, batch):
    rows = jnp.abs(wave - batch["waveform"]).mean(-1) + jnp.square(others["pitch"])
    return rows.mean(), {"mel_loss": rows.mean(), "row_finite": jnp.isfinite(rows)}


def judge(params, wave):
    return jnp.tanh(wave @ params["judge"]["kernel"])


def discriminator_loss(params, fake, real):
    loss = jnp.square(1 - judge(params, real)).mean() + jnp.square(judge(params, fake)).mean()
    return loss, {"real_score": judge(params, real).mean()}


def adversarial_loss(params, fake, real):
    loss = jnp.square(1 - judge(params, fake)).mean() + jnp.abs(judge(params, real) - judge(params, fake)).mean()
    return loss, {"generated_score": judge(params, fake).mean()}


PARTS = {
    "generate": generate,
    "spectral_loss": spectral_loss,
    "discriminator_loss": discriminator_loss,
    "adversarial_loss": adversarial_loss,
    "real": lambda batch: batch["waveform"],
}


def make_step(num_steps=20, **changes):
    generator, discriminators = optimizers(num_steps)
    own = {"optimizer_generator": generator, "optimizer_discriminators": discriminators}
    return make_gan_step(**{**PARTS, **own, **changes})


def host_batch(index, poison=-1):
    random = np.random.default_rng(index)
    batch = {name: random.normal(size=spec.shape).astype(np.float32) for name, spec in SPECS[0].items()}
    if index == poison:
        batch["waveform"][3, 5] = np.nan
    return batch


def run(num_steps, mesh_config, *, poison=-1, resume_at=-1, directory=None, init=init_state, **changes):
    """(every state, the first included; every step's metrics; the last state on its devices)."""
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    abstract, shardings = abstract_state(init, mesh)
    state = make_state(init, shardings, jax.random.key(1))
    steps = compile_steps(make_step(**changes), abstract, shardings, SPECS, mesh)
    states, metrics = [jax.device_get(state)], []
    for index in range(num_steps):
        if index == resume_at:
            with Checkpoints(directory, keep=1) as checkpoints:
                checkpoints.save(index, state)
                checkpoints.wait()
                state = checkpoints.load(abstract)
        batch = global_batch(mesh, host_batch(index, poison), ROWS)
        state, values = steps.for_batch(batch)(state, batch, jax.random.key(2))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics, state


def sgd_step(state, batch, key, rate=0.1):
    """One step by the book with plain gradient descent: (generator, discriminators)."""
    generator, judges = state.params["generator"], state.params["discriminators"]
    _, key = jax.random.split(jax.random.fold_in(key, state.step))  # the first part is for `prepare`
    fake, _ = generate(generator, batch, key)
    down = lambda params, gradients: optax.apply_updates(params, jax.tree.map(lambda g: -rate * g, gradients))  # noqa: E731
    judges = down(judges, jax.grad(lambda p: discriminator_loss(p, fake, batch["waveform"])[0])(judges))

    def whole(params):
        wave, others = generate(params, batch, key)
        return spectral_loss(wave, others, batch)[0] + adversarial_loss(judges, wave, batch["waveform"])[0]

    return down(generator, jax.grad(whole)(generator)), judges
