"""What training draws: ranges, shares, masks as data or dealt out; features; noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.flow_matching.config import DRAWN_PROMPT
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.features import mel_features, speaker_number, stand_in_embedding
from cv2jax.models.flow_matching.noise import frame_noise
from cv2jax.nn.masks import NO_CHUNK, NO_LEFT
from tests.models.golden_flow import small_config

CONFIG = small_config(mask_chunks=(0, 1, 4), mask_lefts=(-1, -1, 6), mask_prompts=(0, 0, DRAWN_PROMPT))
NUM_TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, 4000), jnp.int32)


@pytest.fixture(scope="module")
def draws():
    return draw(CONFIG, jax.random.key(0), NUM_TOKENS, 30)


def test_shares_and_ranges(draws):
    assert draws.noise.shape == (4000, 60, CONFIG.num_mels)
    assert 0 <= float(draws.time.min()) < 0.01 < 0.99 < float(draws.time.max()) < 1
    assert abs(float(draws.is_conditioned.mean()) - 0.8) < 0.03
    limit = np.floor(0.3 * 2 * np.asarray(NUM_TOKENS))
    assert (draws.num_prompt <= limit).all()
    assert (draws.num_prompt == limit).any()
    long = np.asarray(NUM_TOKENS) > 20
    assert abs(float((draws.num_prompt == 0)[long].mean()) - 0.53) < 0.05


def test_each_utterance_draws_its_mask(draws):
    index = np.asarray(draws.mask_index)
    np.testing.assert_allclose(np.bincount(index) / len(index), 1 / 3, atol=0.03)
    np.testing.assert_array_equal(draws.mask.chunk, np.array([NO_CHUNK, 1, 4])[index])
    np.testing.assert_array_equal(draws.mask.left, np.array([NO_LEFT, NO_LEFT, 6])[index])
    drawn = np.where(index == 2, -(-np.asarray(draws.num_prompt) // 2), 0)
    np.testing.assert_array_equal(draws.mask.prompt, drawn)


def test_a_batch_may_draw_one_mask_and_a_kernel_is_dealt_static_ones():
    per_batch = dataclasses.replace(CONFIG, mask_per="batch")
    seen = {tuple(np.unique(draw(per_batch, jax.random.key(i), NUM_TOKENS[:6], 30).mask_index)) for i in range(20)}
    assert seen == {(0,), (1,), (2,)}
    static = draw(CONFIG, jax.random.key(0), NUM_TOKENS[:6], 30, static_masks=True)
    assert static.mask.rows == CONFIG.masks
    np.testing.assert_array_equal(static.mask_index, [0, 1, 2, 0, 1, 2])


def test_mel_and_tokens_are_cut_to_the_shorter():
    # 24 kHz: 480 samples a frame, 960 a token (quirk Q14: 9648 samples are 10 tokens and 20 whole frames).
    num_samples = jnp.array([9648, 9600, 9599, 3000], jnp.int32)
    wave = jnp.asarray(np.random.default_rng(0).integers(-999, 999, (4, 9648)), jnp.int16)
    mel, num_tokens = mel_features(wave, num_samples, jnp.array([11, 10, 10, 2], jnp.int32), 24000, 11)
    np.testing.assert_array_equal(num_tokens, [10, 10, 9, 2])
    assert mel.shape == (4, 22, 80)
    assert not np.any(mel[:, 20:])


def test_stand_in_embeddings_are_unit_vectors_of_the_name_alone():
    numbers = jnp.asarray([speaker_number(name) for name in ("anna", "bo", "anna")], jnp.uint32)
    got = np.asarray(stand_in_embedding(numbers, 24))
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(got[0], got[2])
    assert abs(got[0] @ got[1]) < 0.9


def test_noise_is_a_function_of_key_and_frame():
    keys = jax.random.split(jax.random.key(0), 4)
    prompt = jnp.array([3, 3])
    frames = jnp.array([[0, 2, 3, 7], [7, 3, 2, 0]])
    noise = np.asarray(frame_noise(keys[:2], keys[2:], frames, prompt, 5))
    other = np.asarray(frame_noise(keys[1::-1], keys[:1:-1], frames, prompt, 5))
    np.testing.assert_array_equal(noise[0], other[1][::-1])
    alone = np.asarray(frame_noise(keys[:1], keys[2:3], jnp.array([[7]]), prompt[:1], 5))
    np.testing.assert_array_equal(alone[0, 0], noise[0, 3])
    # Behind the prompt the request's key alone counts, from the prompt's end; inside it the voice's.
    shifted = frame_noise(keys[3:], keys[2:3], jnp.array([[4]]), jnp.array([0]), 5)
    np.testing.assert_array_equal(shifted[0, 0], noise[0, 3])
    # A request may have its voice's key.
    same = frame_noise(keys[:1], keys[:1], jnp.array([[0, 3]]), prompt[:1], 5)
    assert np.abs(same[0, 0] - same[0, 1]).max() > 0.1
    many = frame_noise(keys[:1], keys[2:3], jnp.arange(3000)[None], jnp.array([100]), 4)
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03
