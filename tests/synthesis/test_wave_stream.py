"""Requests of the vocoder: whole and hop by hop the same samples, as late as the model looks ahead; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import UserError
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import hold_back
from cv2jax.synthesis.wave_stream import WaveStreams, synthesise
from cv2jax.tasks.stages import make_wave_stage
from tests.models.golden_hift import make_mel, random_params, small_config

CONFIG = small_config()


@functools.cache
def params_of(config: HiftVocoderConfig):
    """All voiced: an unvoiced frame hides its F0 behind noise."""
    params = random_params(config)
    params["f0_predictor"]["out"]["bias"] = jnp.full(1, 3.0)
    params["f0_predictor"]["out"]["kernel"] *= 0.3
    return params


def definition(config: HiftVocoderConfig = CONFIG, **changes) -> MelDefinition:
    names = [field.name for field in dataclasses.fields(MelDefinition)]
    return MelDefinition(**{name: getattr(config, name) for name in names} | changes)


def stage_of(params):
    return dataclasses.replace(make_wave_stage(CONFIG, params, definition()), sizes=(4, 8))


@functools.cache
def streams() -> WaveStreams:
    return WaveStreams(stage_of(params_of(CONFIG)))


KEY, HOP = jax.random.key(11), CONFIG.mel_hop


def speak(mel: np.ndarray) -> np.ndarray:
    return synthesise(streams().stage, mel, KEY)


def hear(mel: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    stream, parts = streams().start(KEY), []
    for size in sizes:
        parts.append(stream.hop(mel[:size]))
        mel = mel[size:]
    return [*parts, stream.hop(mel, last=True)]


@pytest.mark.parametrize("sizes", [[], [21], [1] * 21, [0, 3, 0, 9, 0], [17, 4], [2, 0, 19, 0]], ids=str)
def test_a_request_is_the_whole_utterance(sizes):
    mel = make_mel(CONFIG, 21, seed=1)
    want, parts = speak(mel), hear(mel, sizes)
    assert want.shape == (21 * HOP,)
    assert want.dtype == parts[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(parts), want, rtol=0, atol=1e-4)
    so_far = np.cumsum([0, *sizes])[1:]
    late = hold_back(CONFIG)
    assert [sum(map(len, parts[: i + 1])) for i in range(len(sizes))] == [max(n * HOP - late, 0) for n in so_far]


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3, 8, 9])
def test_short_requests(num_frames):
    mel = make_mel(CONFIG, num_frames, seed=2)
    want = speak(mel)
    assert want.shape == (num_frames * HOP,)
    for sizes in ([], [num_frames]):
        np.testing.assert_allclose(np.concatenate(hear(mel, sizes)), want, rtol=0, atol=1e-4)


def test_a_longer_block_says_the_same():
    """Whole utterances are padded, to 64 frames and more."""
    mel = make_mel(CONFIG, 70, seed=3)
    np.testing.assert_allclose(np.concatenate(hear(mel, [33])), speak(mel), rtol=0, atol=1e-4)


def test_requests_do_not_disturb_one_another():
    mels = [make_mel(CONFIG, 12, seed=seed) for seed in (4, 5)]
    both, parts = [streams().start(KEY) for _ in mels], [[], []]
    for start in (0, 5):
        for i, stream in enumerate(both):
            parts[i].append(stream.hop(mels[i][start : start + 5]))
    for i, stream in enumerate(both):
        parts[i].append(stream.hop(mels[i][10:], last=True))
        np.testing.assert_allclose(np.concatenate(parts[i]), speak(mels[i]), rtol=0, atol=1e-4)
    again = hear(mels[0], [5, 5])
    for one, two in zip(again, parts[0], strict=True):
        np.testing.assert_array_equal(one, two)
    other = synthesise(streams().stage, mels[0], jax.random.key(12))
    assert np.abs(other - speak(mels[0])).max() > 1e-4


@pytest.mark.parametrize("held", [0, 1, HOP, 5 * HOP + 3])
def test_early_samples_are_guessed_and_what_follows_is_exact(held):
    mel = make_mel(CONFIG, 40, seed=6)
    mel[15:] = mel[15]  # from here on a repetition is the truth
    stream, want = streams().start(KEY), speak(mel)
    assert held < streams().hold_back
    first = stream.hop(mel[:7], hold_back=held)
    assert len(first) == 7 * HOP - held
    known = 7 * HOP - streams().hold_back
    np.testing.assert_allclose(first[: max(known, 0)], want[: max(known, 0)], rtol=0, atol=1e-4)
    assert np.isfinite(first).all()
    assert np.abs(first - want[: len(first)]).max() > 1e-3  # a guess
    second = stream.hop(mel[7:9])  # held back again: these samples were said already
    assert len(second) == 0 or len(first) < 9 * HOP - streams().hold_back
    third = stream.hop(mel[9:25])
    place = max(len(first), 9 * HOP - streams().hold_back)
    np.testing.assert_allclose(third, want[place : place + len(third)], rtol=0, atol=1e-4)
    fourth = stream.hop(mel[25:27], hold_back=held)
    place += len(third)
    assert place + len(fourth) == 27 * HOP - held
    np.testing.assert_allclose(fourth, want[place : place + len(fourth)], rtol=0, atol=1e-4)  # guessed right
    rest = stream.hop(mel[27:], last=True)
    np.testing.assert_allclose(rest, want[27 * HOP - held :], rtol=0, atol=1e-4)


def test_holding_back_all_is_the_plain_stream():
    mel = make_mel(CONFIG, 16, seed=7)
    stream = streams().start(KEY)
    parts = [stream.hop(mel[i : i + 8], hold_back=streams().hold_back) for i in (0, 8)]
    plain = hear(mel, [8, 8])
    for one, two in zip(parts, plain[:2], strict=True):
        np.testing.assert_array_equal(one, two)


def bad_hops():
    nan, infinite, fine = make_mel(CONFIG, 4), make_mel(CONFIG, 4), make_mel(CONFIG, 4)
    nan[2, 1], infinite[0, 0] = np.nan, np.inf
    return {
        "nan": (nan, {}, "mel: 1 of 4 frames hold NaN or infinite values, frame 2 first"),
        "infinite": (infinite, {"last": True}, "mel: 1 of 4 frames .* frame 0 first"),
        "bins": (np.zeros((4, 6), np.float32), {}, r"mel of shape \(4, 6\): this vocoder reads \[frames, 5\]"),
        "negative hold back": (fine, {"hold_back": -1}, "hold_back=-1: give samples, 0"),
        "long hold back": (fine, {"hold_back": hold_back(CONFIG) + 1}, rf"give samples, 0 … {hold_back(CONFIG)} "),
    }


@pytest.mark.parametrize("name", bad_hops())
def test_a_refused_hop_leaves_the_stream_as_it_was(name):
    mel = make_mel(CONFIG, 12, seed=8)
    stream = streams().start(KEY)
    parts = [stream.hop(mel[:5])]
    bad, options, said = bad_hops()[name]
    with pytest.raises(UserError, match=said):
        stream.hop(bad, **options)
    parts += [stream.hop(mel[5:9]), stream.hop(mel[9:], last=True)]
    for one, two in zip(parts, hear(mel, [5, 4]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_stream_ends_once():
    stream = streams().start(KEY)
    stream.hop(make_mel(CONFIG, 2), last=True)
    for options in ({}, {"last": True}):
        with pytest.raises(UserError, match="has ended; start another"):
            stream.hop(make_mel(CONFIG, 2), **options)


def test_damaged_parameters_are_told_and_not_heard():
    damaged = jax.tree.map(lambda a: a * jnp.nan, params_of(CONFIG))
    with pytest.raises(UserError, match="waveform is not finite"):
        synthesise(stage_of(damaged), make_mel(CONFIG, 3), KEY)
    stream = WaveStreams(stage_of(damaged)).start(KEY)
    with pytest.raises(UserError, match="waveform is not finite"):
        stream.hop(make_mel(CONFIG, 12))
    assert stream._num_frames == 0


@pytest.mark.parametrize("value", [-11.5, 0.0, 40.0, -1e4])
@pytest.mark.parametrize("f0", ["predicted", "zero"])
def test_constant_mels_are_finite_and_within_the_limit(value, f0):
    params = jax.tree.map(lambda a: a, params_of(CONFIG))
    if f0 == "zero":
        params["f0_predictor"]["out"] = jax.tree.map(jnp.zeros_like, params["f0_predictor"]["out"])
    mel = np.full((10, CONFIG.num_mels), value, np.float32)
    want = synthesise(stage_of(params), mel, KEY)
    stream = WaveStreams(stage_of(params)).start(KEY)
    got = np.concatenate([stream.hop(mel[:6]), stream.hop(mel[6:], last=True)])
    for wave in (want, got):
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() <= np.float32(0.99)
    if abs(value) < 100:  # of thousands fp32 leaves less
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_warming_up_compiles_every_size():
    sizes, stage = [], streams().stage
    counted = dataclasses.replace(stage, step=lambda *given: sizes.append(given[1].shape[1]) or stage.step(*given))
    WaveStreams(counted).warm_up()
    assert set(sizes) == {4, 8}
    sizes.clear()
    stream = WaveStreams(counted).start(KEY)
    stream.hop(make_mel(CONFIG, 19))
    assert sizes == [8, 8, 4]


def test_a_stage_that_only_streams_says_the_same():
    mel = make_mel(CONFIG, 40, seed=9)
    without = dataclasses.replace(streams().stage, whole=None)
    np.testing.assert_allclose(synthesise(without, mel, KEY), speak(mel), rtol=0, atol=1e-4)
