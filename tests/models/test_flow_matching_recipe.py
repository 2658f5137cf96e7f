"""What our recipes add to the official model: a prior loss, a temperature, tokens that start out alike; what configs refuse."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss, init_params, solve
from cv2jax.nn.masks import ChunkMask, MaskSpec
from tests.models.golden_flow import random_params, small_config

CONFIG = small_config()
PARAMS = random_params(CONFIG)
solved = jax.jit(solve, static_argnums=0)


def make_batch(num_tokens):
    rng, length = np.random.default_rng(0), max(num_tokens)
    return {
        "speech_tokens": jnp.asarray(rng.integers(0, 40, (len(num_tokens), length)), jnp.int32),
        "num_tokens": jnp.array(num_tokens),
        "mel": jnp.asarray(rng.normal(size=(len(num_tokens), 2 * length, 8)), jnp.float32),
        "speaker_embedding": jnp.asarray(rng.normal(size=(len(num_tokens), 6)), jnp.float32),
    }


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_the_prior_loss_is_the_distance_of_tokens_and_speaker_from_the_mel(kind):
    batch = make_batch([6, 2])
    config = dataclasses.replace(CONFIG, loss=kind)
    # Without velocity and with one layer's worth of projections alone the prior can be written down.
    params = jax.tree.map(jnp.copy, PARAMS)
    params["encoder_out"] = jax.tree.map(jnp.zeros_like, params["encoder_out"])
    params["encoder_out"]["bias"] = jnp.full(8, 0.5)
    draws = draw(config, jax.random.key(0), batch["num_tokens"], 6)

    def loss(weight):
        model = FlowMatching(dataclasses.replace(config, prior_weight=weight))
        return jax.jit(flow_loss, static_argnums=0)(model, params, batch, draws)

    plain, error = loss(0.0)
    with_prior, same_error = loss(3.0)
    speaker = FlowMatching(config).apply({"params": params}, batch["speaker_embedding"], method="condition")
    off = np.asarray(0.5 + speaker[:, None] - batch["mel"])
    off = np.abs(off) if kind == "l1" else off**2
    np.testing.assert_allclose(with_prior - plain, 3 * np.concatenate([off[0], off[1, :4]]).mean(), rtol=1e-4)
    np.testing.assert_array_equal(error, same_error)


@pytest.mark.full
def test_the_temperature_scales_the_noise_where_the_solver_starts():
    batch = make_batch([5]) | {"prompt_mel": jnp.zeros((1, 10, 8))}
    noise, mask = jax.random.normal(jax.random.key(0), (1, 10, 8)), MaskSpec(kind="chunk", rows=(ChunkMask(chunk=3),))
    run = lambda temperature, noise: solved(  # noqa: E731
        FlowMatching(dataclasses.replace(CONFIG, temperature=temperature)), PARAMS, batch, noise, mask
    )
    np.testing.assert_allclose(run(0.25, noise), run(1.0, 0.25 * noise), atol=1e-6)
    assert np.abs(run(1.0, noise) - run(0.25, noise)).max() > 1e-2


@pytest.mark.full
def test_the_unconditioned_rows_have_the_masks_of_the_conditioned_ones():
    batch = make_batch([5]) | {"prompt_mel": jnp.zeros((1, 10, 8))}
    noise, masks = jax.random.normal(jax.random.key(0), (1, 10, 8)), (ChunkMask(chunk=3), ChunkMask(chunk=1))
    run = lambda rows: solved(FlowMatching(CONFIG), PARAMS, batch, noise, MaskSpec(kind="chunk", rows=rows))  # noqa: E731
    np.testing.assert_allclose(run(masks), run(masks[:1]), atol=1e-6)
    assert np.abs(run(masks) - run(masks[::-1])).max() > 1e-4


@pytest.mark.full
def test_tokens_that_share_digits_start_out_alike():
    config = small_config(num_speech_tokens=81)
    table = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))["encoder"]["token_embedding"]
    assert float(jnp.std(table)) == pytest.approx(config.encoder.width**-0.5, rel=0.25)
    unit = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    alike = np.asarray(unit @ unit.T)
    digits = np.arange(81)[:, None] // 3 ** np.arange(4) % 3
    shared = (digits[:, None] == digits).sum(-1)
    means = [alike[shared == n].mean() for n in range(4)]
    assert means == sorted(means)
    assert means[3] > means[0] + 0.4


@pytest.mark.full
def test_tokens_may_start_out_as_official():
    config = small_config(num_speech_tokens=81, token_init="official")
    table = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))["encoder"]["token_embedding"]
    assert float(jnp.std(table)) == pytest.approx(1, rel=0.1)
    alike = table @ table.T / config.encoder.width
    assert abs(float((alike - jnp.diag(jnp.diag(alike))).mean())) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "model.temperature=-0.1: must not be negative"),
        ({"prior_weight": -1.0}, "model.prior_weight=-1.0: must not be negative"),
        ({"guidance": -1.0}, "model.guidance=-1.0: must not be negative"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        small_config(**changes).validate()
