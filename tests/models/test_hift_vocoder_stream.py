"""Streams of the vocoder are the whole utterance, for any pieces and any sizes of the model, and as late as it looks ahead."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import UserError
from cv2jax.models.hift_vocoder import model as model_module
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import HiftVocoder
from cv2jax.models.hift_vocoder.stream import init_state, require_mel, step
from cv2jax.nn.signal import ENDLESS
from cv2jax.tasks.stages import make_wave_stage
from tests.models.golden_hift import make_mel, random_params, small_config, with_

CONFIG = small_config()
CONFIGS = {
    "plain": CONFIG,
    "causal pitch": small_config(f0_look_ahead=0),
    "some pitch ahead": small_config(
        f0_look_ahead=2, block_kernels=(7,), source_kernels=(7, 1), dilations=(1, 3), upsample_kernels=(4, 7)
    ),
    "three stages, as official": small_config(
        upsample_rates=(4, 5, 3),
        upsample_kernels=(8, 11, 7),
        source_kernels=(3, 3, 5),
        istft_points=4,
        istft_hop=1,
        dilations=(1,),
    ),
    "one stage": small_config(
        upsample_rates=(6,), upsample_kernels=(8,), source_kernels=(5,), istft_points=16, istft_hop=4, dilations=(3,)
    ),
    "little more than a window": small_config(
        upsample_rates=(6,), upsample_kernels=(6,), source_kernels=(3,), block_kernels=(3,), dilations=(1,)
    ),
}
ALL = pytest.mark.parametrize("name", CONFIGS)
MAX_FRAMES, BLOCK, ROWS = 30, 6, 3
KEYS = jax.random.split(jax.random.key(3), ROWS)


hold_back = functools.cache(model_module.hold_back)


@functools.cache
def params_of(config: HiftVocoderConfig):
    """All voiced: an unvoiced frame hides its F0 behind noise."""
    params = random_params(config)
    params["f0_predictor"]["out"]["bias"] = jnp.full(1, 3.0)
    params["f0_predictor"]["out"]["kernel"] *= 0.3
    return params


@functools.partial(jax.jit, static_argnums=0)
def run_whole(config, params, mel, lengths):
    return HiftVocoder(config).apply({"params": params}, mel, KEYS, lengths).waveform


def whole(config, mel, lengths):
    return np.asarray(run_whole(config, params_of(config), mel, lengths))


def fed(config: HiftVocoderConfig, mel: np.ndarray, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """Each row in random pieces, rows standing anywhere, NaN wherever there is nothing to hear."""
    rng, hop, late = np.random.default_rng(seed), config.mel_hop, hold_back(config)
    ends = lengths + -(-late // hop)
    said_early = rng.random(ROWS) < 0.5
    largest = rng.integers(1, BLOCK + 1, ROWS)  # each row has its own size of hops
    state, seen = init_state(config, ROWS), np.zeros(ROWS, np.int32)
    parts = [[] for _ in lengths]
    while (seen < ends).any():
        valid = np.minimum(rng.integers(0, largest + 1), ends - seen).astype(np.int32)
        block = np.full((ROWS, BLOCK, config.num_mels), np.nan, np.float32)
        for row, (start, count) in enumerate(zip(seen, valid, strict=True)):
            real = mel[row, start : min(start + count, lengths[row])]
            block[row, : len(real)] = real
        total = np.where(said_early | (seen + valid > lengths), lengths, ENDLESS).astype(np.int32)
        made, state = step(config, params_of(config), state, block, KEYS, valid, total)
        for row, count in enumerate(valid):
            parts[row].append(np.asarray(made.waveform[row, : count * hop]))
        seen = seen + valid
    np.testing.assert_array_equal(state.num_frames, ends)
    return [np.concatenate(part)[late:][: n * hop] for part, n in zip(parts, lengths, strict=True)]


def batch(config: HiftVocoderConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of one or two frames, one shorter than what is held back, one of any length."""
    rng = np.random.default_rng(seed)
    lengths = np.array([rng.integers(1, 3), rng.integers(3, 12), rng.integers(12, MAX_FRAMES + 1)], np.int32)
    return make_mel(config, ROWS, MAX_FRAMES, seed=seed), rng.permutation(lengths)


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name in CONFIGS for seed in range(20 if name == "plain" else 3)]
)
def test_any_pieces_are_the_whole(name, seed):
    config = CONFIGS[name]
    mel, lengths = batch(config, seed)
    want = whole(config, mel, lengths)
    assert np.std(want[:, : config.mel_hop]) > 1e-3
    for row, got in enumerate(fed(config, mel, lengths, seed)):
        assert got.shape == (lengths[row] * config.mel_hop,)
        np.testing.assert_allclose(got, want[row, : len(got)], rtol=0, atol=1e-4)


@ALL
def test_what_is_held_back_is_what_the_model_looks_ahead(name):
    """A NaN frame is first heard exactly there; all before is known without it.

    At some sizes the element that `reflect_start` copies would lie in another chunk: those wait for it.
    """
    config, at = CONFIGS[name], 20
    mel, lengths = make_mel(config, ROWS, MAX_FRAMES), np.full(ROWS, MAX_FRAMES, np.int32)
    clean = whole(config, mel, lengths)
    mel[:, at] = np.nan
    heard = np.isnan(whole(config, mel, lengths)).any(axis=0)
    assert np.isfinite(clean).all()
    waiting = 2 * config.istft_hop if name == "some pitch ahead" else 0
    assert config.mel_hop * at - int(heard.argmax()) == hold_back(config) - waiting


def test_the_official_model_holds_back_395_ms():
    assert hold_back(HiftVocoderConfig()) == 9480
    assert hold_back(HiftVocoderConfig(f0_look_ahead=0)) == 7080


@pytest.mark.full
def test_the_official_kernels_look_ahead_as_far():
    """Of the official model with few channels: 9,480 samples in all, 6,300 along the mel's own path."""
    config = HiftVocoderConfig(width=8, f0_width=4, num_mels=5)
    assert hold_back(config) == 9480
    mel = make_mel(config, ROWS, 50)
    mel[:, 30] = np.nan
    heard = np.isnan(whole(config, mel, np.full(ROWS, 50, np.int32)))[0]
    assert 30 * 480 - heard.argmax() == 9480
    decode = jax.jit(lambda mel: HiftVocoder(config).apply({"params": params_of(config)}, mel, source, method="decode"))
    source = jnp.zeros((ROWS, 50 * 480))
    assert 30 * 480 - np.isnan(decode(mel))[0].argmax() == 6300


def test_a_state_has_the_same_size_however_long_it_gets():
    state = init_state(CONFIG, ROWS)
    sizes = lambda state: [(a.shape, a.dtype) for a in jax.tree.leaves(state)]  # noqa: E731
    want = sizes(state)
    assert all(leaf.shape[0] == ROWS for leaf in jax.tree.leaves(state))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 5_000 * ROWS
    full, endless = np.full(ROWS, BLOCK, np.int32), np.full(ROWS, ENDLESS, np.int32)
    for seed in range(3):
        block = make_mel(CONFIG, ROWS, BLOCK, seed=seed)
        _, state = step(CONFIG, params_of(CONFIG), state, block, KEYS, full, endless)
        assert sizes(state) == want


def test_the_first_step_needs_no_state():
    mel, counts = make_mel(CONFIG, ROWS, BLOCK), jnp.full(ROWS, BLOCK, jnp.int32)
    endless, params = jnp.full(ROWS, ENDLESS, jnp.int32), params_of(CONFIG)
    first = jax.jit(
        lambda mel: HiftVocoder(CONFIG).apply({"params": params}, mel, KEYS, None, counts, endless, method="step")
    )
    want, state = step(CONFIG, params, init_state(CONFIG, ROWS), mel, KEYS, counts, endless)
    got, other = first(mel)
    np.testing.assert_allclose(got.waveform, want.waveform, rtol=0, atol=1e-5)
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


# ---- Mel of another definition


def definition(config: HiftVocoderConfig = CONFIG, **changes) -> MelDefinition:
    names = [field.name for field in dataclasses.fields(MelDefinition)]
    return MelDefinition(**{name: getattr(config, name) for name in names} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate_hz": 16000}, r"rate_hz 16000 \(the vocoder's: 1200\)"),
        ({"num_mels": 128}, r"num_mels 128 \(the vocoder's: 5\)"),
        ({"mel_fmax_hz": 12000.0, "mel_fft": 1024}, r"mel_fft 1024 .*: 96\), mel_fmax_hz 12000 .*: 400\)"),
        ({"mel_hop": 10}, r"mel_hop 10 \(the vocoder's: 24\)"),
    ],
)
def test_mel_of_another_definition_is_refused(changes, said):
    other = definition(**changes)
    for call in (
        lambda: require_mel(CONFIG, other),
        lambda: make_wave_stage(CONFIG, {}, other),
    ):
        with pytest.raises(UserError, match=f"mel of another definition: {said}"):
            call()


def test_the_official_model_reads_the_flows_mel():
    require_mel(HiftVocoderConfig(), MelDefinition())
    with pytest.raises(UserError, match="mel of another definition"):
        require_mel(with_(HiftVocoderConfig(), mel_fmax_hz=12000.0), MelDefinition())
