"""The flow against the numbers of the official modules (golden/README.md)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.flow_matching.cfm import time_grid
from cv2jax.models.flow_matching.config import LOOKAHEAD
from cv2jax.models.flow_matching.draws import FlowDraws
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss, padded_masks, solve
from cv2jax.models.flow_matching.noise import official_noise
from cv2jax.nn.masks import NO_CHUNK, ChunkMask, MaskSpec, length_mask
from tests.models.golden_flow import CHUNK, GOLDEN_CONFIG, golden_params, load

HIGHEST = jax.default_matmul_precision("highest")
MASKS = {"full": ChunkMask(chunk=NO_CHUNK), "stream": ChunkMask(chunk=CHUNK)}


def spec(name: str) -> MaskSpec:
    return MaskSpec(kind="chunk", rows=(MASKS[name],))


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.full)], ids=["scanned", "unrolled"])
def golden(request):
    config = dataclasses.replace(GOLDEN_CONFIG, scan_layers=request.param)
    return FlowMatching(config), golden_params(config)


def assert_close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["full", "stream"])
def test_one_call_of_the_velocity_network(golden, kind):
    model, params = golden
    g = load("estimator_tiny")
    num_frames = jnp.asarray(g["mask"].sum(axis=(1, 2)), jnp.int32)
    mask = MaskSpec(kind="chunk", rows=(MASKS[kind].scaled(2),), segments=length_mask(num_frames, 58).astype(jnp.int32))
    x, mu, cond = (jnp.asarray(g[name].swapaxes(1, 2)) for name in ("x", "mu", "cond"))
    with HIGHEST:
        run = jax.jit(functools.partial(model.apply, method="velocity"))
        velocity, _, _ = run({"params": params}, x, g["t"], mu, g["spks"], cond, mask)
    valid = g["mask"].swapaxes(1, 2)
    assert_close(velocity * valid, g[f"out_{kind}"].swapaxes(1, 2) * valid)


@pytest.mark.parametrize("kind", ["full", "stream"])
@pytest.mark.parametrize("num_lookahead", [0, LOOKAHEAD])
def test_encoder_and_projections(golden, kind, num_lookahead):
    model, params = golden
    g = load("flow_infer_tiny")
    tokens = jnp.concatenate([g["prompt_token"], g["token"]], axis=1)
    num_tokens = jnp.array([tokens.shape[1] - num_lookahead])
    masks = padded_masks(spec(kind), num_tokens, tokens.shape[1])
    arrays = tuple(m.array(size, size) for m, size in zip(masks, (50, 100), strict=True))
    ahead = jnp.pad(tokens, ((0, 0), (0, LOOKAHEAD)))
    arguments = (ahead, num_tokens, jnp.array([num_lookahead]), arrays)
    with HIGHEST:
        run = lambda method: jax.jit(functools.partial(model.apply, method=method))({"params": params}, *arguments)[0]  # noqa: E731
        encoded, mu = run(lambda m, *a: m.encoder(*a)), run("encode")
        speaker = model.apply({"params": params}, g["embedding"], method="condition")
    name = f"enc{'_ctx' if num_lookahead else ''}_stream{int(kind == 'stream')}"
    assert_close(encoded[:, : 100 - 2 * num_lookahead], g[name])
    assert_close(speaker, g["spk"], 1e-5)
    if kind == "full" and not num_lookahead:
        assert_close(mu, g["mu"])


def test_time_grid_and_noise_are_the_official_ones():
    g = load("flow_infer_tiny")
    assert_close(time_grid(10), g["t_span"], 1e-6)
    assert_close(official_noise()[:64].T, g["rand_noise_head"], 1e-6)
    assert official_noise().shape == (15000, 80)


@pytest.mark.parametrize(
    ("name", "kind", "num_lookahead", "has_prompt"),
    [
        ("out_nonstream_final", "full", 0, True),
        ("out_stream_final", "stream", 0, True),
        ("out_stream_notfinal", "stream", LOOKAHEAD, True),
        ("out_sft", "full", 0, False),
    ],
)
def test_mel_of_whole_sequences(golden, name, kind, num_lookahead, has_prompt):
    model, params = golden
    g = load("flow_infer_tiny")
    tokens, prompt = g["token"], g["prompt_feat"]
    if has_prompt:
        tokens = np.concatenate([g["prompt_token"], tokens], axis=1)
    else:
        prompt = prompt[:, :0]
    num_frames = 2 * tokens.shape[1]
    batch = {
        "speech_tokens": jnp.asarray(tokens),
        "num_tokens": jnp.array([tokens.shape[1] - num_lookahead]),
        "num_lookahead": jnp.array([num_lookahead]),
        "prompt_mel": jnp.pad(prompt, ((0, 0), (0, num_frames - prompt.shape[1]), (0, 0))),
        "speaker_embedding": jnp.asarray(g["embedding"]),
    }
    noise = jnp.asarray(official_noise()[None, :num_frames])
    with HIGHEST:
        mel = jax.jit(solve, static_argnums=0)(model, params, batch, noise, spec(kind))
    got = np.asarray(mel)[:, prompt.shape[1] : num_frames - 2 * num_lookahead]
    assert_close(got.swapaxes(1, 2), g[name])


@pytest.mark.parametrize("seed", [1, 2, 6])
def test_training_loss_with_the_official_draws(golden, seed):
    model, params = golden
    g = load(f"flow_loss_s{seed}_tiny")
    model = FlowMatching(model.config, masks_padding=False)  # the goldens have quirk Q15
    batch = {
        "speech_tokens": jnp.asarray(g["speech_token"], jnp.int32),
        "num_tokens": jnp.asarray(g["speech_token_len"], jnp.int32),
        "mel": jnp.asarray(g["speech_feat"]),
        "speaker_embedding": jnp.asarray(g["embedding"]),
    }
    draws = FlowDraws(
        time=jnp.asarray(g["t"][:, 0, 0]),
        noise=jnp.asarray(g["z"].swapaxes(1, 2)),
        num_prompt=jnp.asarray(g["cond_len"], jnp.int32),
        is_conditioned=jnp.asarray(g["keep"]),
        mask=spec("stream" if g["streaming"] else "full"),
        mask_index=jnp.zeros(3, jnp.int32),
    )
    with HIGHEST:
        loss, _ = jax.jit(flow_loss, static_argnums=0)(model, params, batch, draws)
    assert_close(loss, g["loss"], 1e-5)
