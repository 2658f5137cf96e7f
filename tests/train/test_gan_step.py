"""The GAN step: its order, its warm-up, what it skips, how it resumes, and that a mesh changes nothing."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from cv2jax.config import MeshConfig
from cv2jax.models.hift_vocoder.discriminators import Discriminators
from cv2jax.models.hift_vocoder.losses import adversarial_loss, discriminator_loss, feature_matching_loss, tpr_loss
from cv2jax.train.gan_step import evaluation_generator, gan_optimizer, init_gan_state
from cv2jax.train.hashes import batch_hash
from cv2jax.train.state import evaluation_params, restart
from tests.models.golden_discriminators import SMALL
from tests.train import toy_gan
from tests.train.toy_gan import ONE

NAMES = {"mel_loss", "row_finite", "real_score", "generated_score", "loss", "discriminator_loss", "grad_norm"}
NAMES |= {"discriminator_grad_norm", "skipped", "num_skipped", "batch_hash"}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, other)


def kernel(params, network="generator"):
    return np.asarray(params[network]["wave" if network == "generator" else "judge"]["kernel"])


def first_state():
    return nn.unbox(toy_gan.init_state(jax.random.key(1)))


def sgd_state():
    params = first_state().params
    return init_gan_state(params["generator"], params["discriminators"], optax.sgd(0.1), optax.sgd(0.1))


# One period and one resolution: the mesh knows no more of the others.
TINY = dataclasses.replace(SMALL, periods=(3,), fft_sizes=(32,), hop_lengths=(12,), window_lengths=(24,))
SGD = {"optimizer_generator": optax.sgd(0.1), "optimizer_discriminators": optax.sgd(0.1)}


def test_the_discriminators_move_first_and_the_generator_against_the_new_ones():
    state, step = sgd_state(), jax.jit(toy_gan.make_step(**SGD))
    for index in range(3):
        batch, key = toy_gan.host_batch(index), jax.random.key(5)
        generator, judges = toy_gan.sgd_step(state, batch, key)
        fake, others = toy_gan.generate(
            state.params["generator"], batch, jax.random.split(jax.random.fold_in(key, index))[1]
        )
        state, metrics = step(state, batch, key)
        close(state.params, {"generator": generator, "discriminators": judges})
        spectral = toy_gan.spectral_loss(fake, others, batch)[0]
        adversarial = toy_gan.adversarial_loss(judges, fake, batch["waveform"])[0]
        assert float(metrics["loss"]) == pytest.approx(float(spectral + adversarial), rel=1e-5)
        assert metrics.keys() == NAMES
        assert metrics["batch_hash"] == batch_hash(jax.tree.map(jnp.asarray, batch))
    assert state.step == 3


def test_the_generator_runs_once_a_step():
    calls = []

    def counted(params, batch, key):
        calls.append(1)
        return toy_gan.generate(params, batch, key)

    jax.make_jaxpr(toy_gan.make_step(generate=counted))(first_state(), toy_gan.host_batch(0), jax.random.key(0))
    assert len(calls) == 1


def test_each_network_is_clipped_by_itself():
    clipped = lambda norm: optax.chain(optax.clip_by_global_norm(norm), optax.sgd(1.0))  # noqa: E731
    own = {"optimizer_generator": clipped(0.01), "optimizer_discriminators": clipped(0.02)}
    params = sgd_state().params
    state = init_gan_state(params["generator"], params["discriminators"], *own.values())
    new, metrics = jax.jit(toy_gan.make_step(**own))(state, toy_gan.host_batch(0), jax.random.key(0))
    for network, norm, name in (
        ("generator", 0.01, "grad_norm"),
        ("discriminators", 0.02, "discriminator_grad_norm"),
    ):
        assert metrics[name] > norm
        moved = kernel(new.params, network) - kernel(params, network)
        assert np.linalg.norm(moved) == pytest.approx(norm, rel=1e-4)


def test_warm_up_leaves_the_discriminators_alone_and_is_a_spectral_training():
    states, metrics, _ = toy_gan.run(5, ONE, adversarial_from=3)
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        moves = not np.array_equal(kernel(before.params, "discriminators"), kernel(after.params, "discriminators"))
        assert moves == (index >= 3)
        assert not np.array_equal(kernel(before.params), kernel(after.params))
        assert metrics[index].keys() == NAMES
        assert (metrics[index]["discriminator_loss"] != 0) == (index >= 3)
        assert (metrics[index]["loss"] == metrics[index]["mel_loss"]) == (index < 3)
    same(states[3].opt_state["discriminators"], states[0].opt_state["discriminators"])
    silent = lambda params, fake, real: (0.0 * fake.sum(), {"generated_score": 0.0 * real.sum()})  # noqa: E731
    alone, _, _ = toy_gan.run(3, ONE, adversarial_loss=silent)
    close(states[3].params["generator"], alone[3].params["generator"])


def shapes_made(jaxpr, outside_of="cond"):
    """The shapes of all that a program computes, but for what is in a branch."""
    for equation in jaxpr.eqns:
        if equation.primitive.name != outside_of:
            yield from (value.aval.shape for value in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes_made(inner, outside_of)


def test_warm_up_costs_no_discriminator():
    given = (first_state(), toy_gan.host_batch(0), jax.random.key(0))
    scores = (toy_gan.ROWS, 2)
    for start, run in ((3, False), (0, True)):
        program = jax.make_jaxpr(toy_gan.make_step(adversarial_from=start))(*given)
        assert (scores in set(shapes_made(program.jaxpr))) == run
        assert (toy_gan.ROWS, toy_gan.SAMPLES) in set(shapes_made(program.jaxpr))


@pytest.mark.parametrize("adversarial_from", [0, 1, 9])
def test_a_poisoned_batch_changes_neither_network(adversarial_from):
    states, metrics, _ = toy_gan.run(4, ONE, poison=2, adversarial_from=adversarial_from)
    same(states[3].params, states[2].params)
    same(states[3].opt_state, states[2].opt_state)
    assert [bool(m["skipped"]) for m in metrics] == [False, False, True, False]
    assert [int(m["num_skipped"]) for m in metrics] == [0, 0, 1, 1]
    assert metrics[2]["row_finite"].tolist() == [row != 3 for row in range(toy_gan.ROWS)]
    assert np.isfinite(kernel(states[4].params)).all()
    assert not np.array_equal(kernel(states[4].params), kernel(states[3].params))


def poisoned_slope(loss):
    """The same value, a gradient of infinity."""

    @jax.custom_vjp
    def poison(x):
        return x

    poison.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.inf),))
    return lambda *args: (poison(loss(*args)[0]), loss(*args)[1])


@pytest.mark.parametrize("name", ["discriminator_loss", "adversarial_loss", "spectral_loss"])
def test_a_gradient_of_either_network_that_is_not_finite_changes_neither(name):
    states, metrics, _ = toy_gan.run(1, ONE, **{name: poisoned_slope(toy_gan.PARTS[name])})
    same(states[1].params, states[0].params)
    same(states[1].opt_state, states[0].opt_state)
    assert metrics[0]["skipped"]
    assert states[1].step == 1


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    options = {"poison": 1, "adversarial_from": 2}
    want, wanted, _ = toy_gan.run(6, ONE, **options)
    got, found, _ = toy_gan.run(6, ONE, **options, resume_at=4, directory=tmp_path)
    same(got, want)
    same(found, wanted)
    assert [bool(m["skipped"]) for m in found] == [index == 1 for index in range(6)]


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_nothing_but_where_things_are(mesh):
    want, wanted, _ = toy_gan.run(4, ONE, adversarial_from=1, poison=2)
    got, found, last = toy_gan.run(4, mesh, adversarial_from=1, poison=2)
    close(got[-1].params, want[-1].params)
    close(got[-1].opt_state, want[-1].opt_state)
    for one, other in zip(found, wanted, strict=True):
        assert one["batch_hash"] == other["batch_hash"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    placed = last.params["discriminators"]["judge"]["kernel"].sharding
    # optax keeps the moments in the second place of the chain, Adam's first in that one
    assert last.opt_state["discriminators"][1][0].mu["judge"]["kernel"].sharding == placed


def test_the_average_is_the_generators_alone():
    states, _, last = toy_gan.run(3, ONE, adversarial_from=1)
    want = kernel(states[0].params)
    for state in states[1:]:
        want = 0.75 * want + 0.25 * kernel(state.params)
    np.testing.assert_allclose(evaluation_generator(last)["wave"]["kernel"], want, rtol=1e-5)
    assert optax.tree.get(last.opt_state["discriminators"], "ema_params", None) is None
    plain = sgd_state()
    assert evaluation_generator(plain)["wave"]["kernel"] is plain.params["generator"]["wave"]["kernel"]
    assert evaluation_params(plain).keys() == {"generator", "discriminators"}


def test_a_state_starts_anew_from_other_weights():
    *_, state = toy_gan.run(2, ONE)
    taken = {"generator": {"wave": {"kernel": jnp.ones((toy_gan.WIDTH, toy_gan.SAMPLES))}}}
    new = restart(state, taken, gan_optimizer(*toy_gan.optimizers()))
    assert new.step == 0
    assert (kernel(new.params) == 1).all()
    np.testing.assert_array_equal(evaluation_generator(new)["wave"]["kernel"], 1)


def test_both_optimizers_as_one_update_each_its_own():
    both = gan_optimizer(optax.sgd(0.1), optax.sgd(0.2))
    params = {"generator": jnp.ones(2), "discriminators": jnp.ones(3)}
    for given in (params, None):
        updates, _ = both.update(params, both.init(params), given)
        np.testing.assert_allclose(updates["generator"], [-0.1] * 2)
        np.testing.assert_allclose(updates["discriminators"], [-0.2] * 3)


def vocoder_parts():
    """The true discriminators and losses."""
    apply = lambda params, wave: Discriminators(TINY).apply({"params": params}, wave)  # noqa: E731

    def judged(params, fake, real):
        generated, recorded = apply(params, fake), apply(params, real)
        return [[[j.scores for j in js], [j.feature_maps for j in js]] for js in (recorded, generated)]

    def losing(params, fake, real):
        (r, _), (g, _) = judged(params, fake, real)
        return discriminator_loss(r, g) + tpr_loss(r, g), {}

    def winning(params, fake, real):
        (r, recorded), (g, generated) = judged(params, fake, real)
        return adversarial_loss(g) + 2 * feature_matching_loss(recorded, generated) + tpr_loss(g, r), {}

    return {"discriminator_loss": losing, "adversarial_loss": winning}


@pytest.mark.full
def test_the_vocoders_own_discriminators_play_on_a_mesh_as_on_one_device():
    def init(key):
        judges = Discriminators(TINY).init(key, jnp.zeros((1, toy_gan.SAMPLES)))["params"]
        return init_gan_state(toy_gan.init_state(key).params["generator"], judges, *SGD.values())

    one, many = (
        toy_gan.run(2, mesh, init=init, **SGD, **vocoder_parts())
        for mesh in (ONE, MeshConfig(data=2, fsdp=2, tensor=2))
    )
    close(many[0][-1].params, one[0][-1].params)
    moved = jax.tree.map(lambda a, b: (a != b).any(), one[0][-1].params, one[0][0].params)
    assert all(jax.tree.leaves(moved))
    assert one[1][-1]["discriminator_loss"] > 0
    np.testing.assert_allclose(many[1][-1]["loss"], one[1][-1]["loss"], rtol=1e-5)
