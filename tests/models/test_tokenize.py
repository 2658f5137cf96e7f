"""Waveforms to tokens: the exact count at every length, the windows' seams, batch mates, compilations, the hash."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.mel import log_mel_whisper
from cv2jax.config import MeshConfig, UserError
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import encode, init_model_state
from cv2jax.models.speech_tokenizer.tokenize import (
    PIECE_FRAMES,
    compare_windows,
    init_encoding_params,
    make_encoder,
    plan_windows,
    tokenizer_hash,
)
from cv2jax.parallel.mesh import make_mesh

CONFIG = SpeechTokenizerConfig(
    width=16, num_heads=1, num_layers=1, encoder2_layers=1, decoder_layers=1, mlp_ratio=2, scan_layers=False
)
# 0.1 s to 62 s: around the piece lengths, 30 s, the first strides, and upstream's losses (52.4 s, 53 s, 56 s).
SECONDS = (0.1, 0.11, 3.0, 3.01, 14.99, 29.99, 30.0, 30.01, 52.4, 53.0, 56.0, 56.01, 60.0)


def make_params(config: SpeechTokenizerConfig) -> dict:
    return jax.jit(lambda key: nn.unbox(init_encoding_params(config, key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def params() -> dict:
    return make_params(CONFIG)


def make_sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose loudness wanders, so that neighbouring tokens differ."""
    generator = np.random.default_rng(seed)
    loudness = np.abs(np.sin(np.arange(num_samples) / 3000)) * 0.1
    return (generator.standard_normal(num_samples) * loudness).astype(np.float32)


def count_tokens(num_samples: int) -> int:
    return int(np.ceil(num_samples // 160 / 4))


def test_windows_cover_every_token_once_at_every_length() -> None:
    borders = {w * 2600 + b for w in range(24) for b in (0, 400) for b in range(b - 5, b + 6)}
    for num_frames in sorted(f for f in borders | set(range(1, 61_000, 61)) if f > 0):
        windows = plan_windows(num_frames)
        assert windows[0].first == 0
        assert windows[-1].end == -(-num_frames // 4)
        assert all(a.end == b.first for a, b in itertools.pairwise(windows))
        assert all(w.num_frames <= 3000 and w.start_frame + w.num_frames <= num_frames for w in windows)
        for w in windows:
            assert w.start_frame % 4 == 0
            assert w.first == w.start_frame // 4 + w.skip
            assert w.end - w.start_frame // 4 <= -(-w.num_frames // 4)  # the window has every token it is asked for
            # At an inner cut, 50 tokens (2 s) of context lie between a token and the cut.
            assert w.skip == (50 if w.start_frame else 0)
        assert len(windows) == 1 or windows[-2].start_frame + 3000 < num_frames
        assert windows[-1].start_frame + 3000 >= num_frames


def test_every_length_gets_its_count_and_batch_mates_change_nothing(params: dict) -> None:
    waveforms = [make_sound(round(s * 16000), i) for i, s in enumerate(SECONDS)]
    encoder = make_encoder(CONFIG, params, batch_seconds=31.0)
    batched = encoder(waveforms)
    assert [len(t) for t in batched] == [count_tokens(len(w)) for w in waveforms]
    assert all(t.dtype == np.int32 and t.min() >= 0 and t.max() < CONFIG.num_codes for t in batched)
    alone = [encoder([waveform])[0] for waveform in waveforms]
    flips = sum(int(np.sum(a != b)) for a, b in zip(alone, batched, strict=True))
    assert flips == 0, f"{flips} near ties flipped between batch shapes"
    # A small program and a full one for each piece length, and for windows: the documented bound.
    assert len(encoder.shapes_used) <= 2 * (len(PIECE_FRAMES) + 1)
    before = set(encoder.shapes_used)
    encoder([make_sound(n) for n in (1600, 20_000, 50_000, 479_999)])
    assert encoder.shapes_used == before  # other lengths, the same programs
    assert len({t for tokens in batched for t in tokens.tolist()}) > 50


@pytest.mark.full
def test_every_length_up_to_ten_minutes_gets_its_count(params: dict) -> None:
    encoder = make_encoder(CONFIG, params)
    seconds = [*np.arange(0.1, 5, 0.1), *np.arange(5, 66, 0.93), *(f / 100 for f in range(5195, 5610, 15))]
    seconds += [26.0 * w + s for w in range(1, 22) for s in (3.99, 4.0, 4.01)] + [599.99, 600.0]
    lengths = [round(s * 16000) + extra for s in seconds for extra in (0, 1, 159)]
    sound = make_sound(600 * 16000 + 200)
    for number, tokens in encoder.encode_stream((n, sound[:n]) for n in lengths):
        assert len(tokens) == count_tokens(number), number
    assert len(encoder.shapes_used) <= 2 * (len(PIECE_FRAMES) + 1)


def test_a_long_file_is_its_windows_cut_in_the_middle_of_the_overlap(params: dict) -> None:
    waveform = make_sound(60 * 16000)
    mel = log_mel_whisper(waveform[None])[0]  # of the whole file: one maximum, one floor
    encoder = make_encoder(CONFIG, params)
    cut = [mel[0, :, start : start + 3000] for start in (0, 2600, 5200)]
    tokens = [np.asarray(encoder.run("mel", 3000, [m], 1))[0, : -(-m.shape[1] // 4)] for m in cut]
    expected = np.concatenate([tokens[0][:700], tokens[1][50:700], tokens[2][50:]])
    np.testing.assert_array_equal(encoder([waveform])[0], expected)
    one_piece = encode(CONFIG, params, jnp.asarray(mel), jnp.array([6000], jnp.int32))[0]
    comparison = compare_windows(encoder, np.concatenate([waveform, waveform]))  # only the first 60 s count
    assert comparison.num_tokens == 1500
    assert comparison.num_different == int(np.sum(np.asarray(one_piece)[0] != expected)) > 0


def test_stream_keeps_order_and_takes_less_than_one_frame(params: dict) -> None:
    lengths = [48_000, 100, 1600, 0, 500_000, 161, 160]
    encoder = make_encoder(CONFIG, params, batch_seconds=6.0)
    result = list(encoder.encode_stream((f"u{n}", make_sound(n)) for n in lengths))
    assert [key for key, _ in result] == [f"u{n}" for n in lengths]
    assert [len(tokens) for _, tokens in result] == [count_tokens(n) for n in lengths]


def test_devices_share_the_rows(params: dict) -> None:
    waveforms = [make_sound(n, n) for n in (1600, 8000, 24_000)]
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    encoder = make_encoder(CONFIG, params, mesh=mesh, batch_seconds=12.0)
    shared, alone = encoder(waveforms), make_encoder(CONFIG, params)(waveforms)
    assert {rows % 2 for _, _, rows in encoder.shapes_used} == {0}
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_vq_and_bfloat16_and_no_quantizer(params: dict) -> None:
    vq = dataclasses.replace(CONFIG, quantizer="vq", codebook_size=64)
    state = nn.unbox(init_model_state(vq, jax.random.key(1)))
    tokens = make_encoder(vq, make_params(vq), state, compute_dtype="bfloat16")([make_sound(16_000)])[0]
    assert len(tokens) == 25
    assert 0 <= tokens.min() <= tokens.max() < 64
    assert len(set(tokens.tolist())) > 1
    with pytest.raises(UserError, match="quantizer 'none'"):
        make_encoder(dataclasses.replace(CONFIG, quantizer="none"), params)
    for seconds in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(UserError, match="batch_seconds"):
            make_encoder(CONFIG, params, batch_seconds=seconds)


def test_hash_follows_what_decides_the_tokens_and_nothing_else(params: dict) -> None:
    digest = tokenizer_hash(CONFIG, params)
    assert len(digest) == 64
    same = dataclasses.replace(CONFIG, dtype="bfloat16", dropout=0.3, encoder2_layers=5, vocabulary_size=99)
    assert tokenizer_hash(same, params | {"decoder": {"bias": jnp.ones(3)}}) == digest
    scanned = {"blocks": jax.tree.map(lambda a: a[None], params["encoder"]["stack"]["blocks_0"])}
    assert tokenizer_hash(CONFIG, params | {"encoder": params["encoder"] | {"stack": scanned}}) == digest
    assert tokenizer_hash(dataclasses.replace(CONFIG, rope_theta=5e3), params) != digest
    changed = jax.tree.map(lambda a: a, params)
    changed["quantizer"]["project_down"]["bias"] += 1e-6
    assert tokenizer_hash(CONFIG, changed) != digest
