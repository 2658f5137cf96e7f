"""The flow in hops equals the solve of the whole sequence: any chunking, mask, prompt and end."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.flow_matching.config import LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.generate import choose_mask, offline_mask, stream_mask
from cv2jax.models.flow_matching.model import FlowMatching, init_params, solve
from cv2jax.models.flow_matching.step import FlowState, Hop, grow_state, init_state, state_bytes, step
from cv2jax.nn.masks import NO_CHUNK, NO_LEFT, MaskSpec
from tests.models.golden_flow import random_params, small_config

MAX_TOKENS, SLOTS = 40, 48
HOPS = (5, 8, 16)  # static shapes: each compiles once
CONFIG = small_config()
MODEL = FlowMatching(CONFIG)
PARAMS = random_params(CONFIG)


@jax.jit
def whole(batch, noise, mask):
    return solve(MODEL, PARAMS, batch, noise, mask)


@jax.jit
def hop_step(state, hop):
    return step(MODEL, PARAMS, state, hop)


@dataclasses.dataclass
class Utterances:
    """Random rows: tokens behind a prompt, of their own length, each under its own mask."""

    tokens: np.ndarray
    num_tokens: np.ndarray
    prompt: np.ndarray
    prompt_mel: np.ndarray
    noise: np.ndarray
    speaker: np.ndarray
    chunk: np.ndarray
    left: np.ndarray

    @classmethod
    def draw(cls, seed: int, num_rows: int = 4) -> "Utterances":
        rng = np.random.default_rng(seed)
        frames = (num_rows, 2 * MAX_TOKENS, CONFIG.num_mels)
        num_tokens = rng.integers(1, MAX_TOKENS + 1, num_rows)
        prompt = np.minimum(rng.integers(0, 14, num_rows) * rng.integers(0, 2, num_rows), num_tokens)
        mel = rng.normal(size=frames).astype(np.float32)
        return cls(
            tokens=rng.integers(0, CONFIG.num_speech_tokens, (num_rows, MAX_TOKENS)),
            num_tokens=num_tokens,
            prompt=prompt,
            prompt_mel=np.where(np.arange(2 * MAX_TOKENS)[None, :, None] < 2 * prompt[:, None, None], mel, 0),
            noise=rng.normal(size=frames).astype(np.float32),
            speaker=rng.normal(size=(num_rows, CONFIG.speaker_dim)).astype(np.float32),
            chunk=rng.choice([1, 3, 5], num_rows),
            left=rng.choice([NO_LEFT, 0, 4, 11], num_rows),
        )

    def masks(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(getattr(self, name), jnp.int32) for name in ("chunk", "left", "prompt")}

    def solved(self, **changes) -> np.ndarray:
        batch = {
            "speech_tokens": jnp.asarray(self.tokens, jnp.int32),
            "num_tokens": jnp.asarray(self.num_tokens, jnp.int32),
            "prompt_mel": jnp.asarray(self.prompt_mel, jnp.float32),
            "speaker_embedding": jnp.asarray(self.speaker),
        }
        mask = MaskSpec(kind="chunk", **self.masks())
        return np.asarray(whole(batch | changes, jnp.asarray(self.noise), mask))

    def hop(self, starts: np.ndarray, counts: np.ndarray, size: int) -> Hop:
        """What the next `counts` tokens of each row need; garbage where nothing is."""

        def cut(values, size, rate, filler):
            padded = np.pad(values, ((0, 0), (0, rate * size)) + ((0, 0),) * (values.ndim - 2), constant_values=filler)
            return jnp.asarray(
                np.stack([row[rate * at : rate * (at + size)] for row, at in zip(padded, starts, strict=True)])
            )

        ahead = np.minimum(LOOKAHEAD, self.num_tokens - starts - counts)
        return Hop(
            speech_tokens=cut(self.tokens.astype(np.int32), size + LOOKAHEAD, 1, 7),
            num_tokens=jnp.asarray(counts, jnp.int32),
            num_lookahead=jnp.asarray(ahead, jnp.int32),
            noise=cut(self.noise, size, 2, 9.0),
            prompt_mel=cut(self.prompt_mel.astype(np.float32), size, 2, 9.0),
            speaker_embedding=jnp.asarray(self.speaker),
            **self.masks(),
        )


def counts_of(u: Utterances, starts: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """For each row any number of tokens up to `size` (none, too) that ends on a border of its chunks, or is the rest."""
    counts = []
    for start, end, chunk in zip(starts.tolist(), u.num_tokens.tolist(), u.chunk.tolist(), strict=True):
        borders = [n for n in range(size + 1) if (start + n) % chunk == 0 and start + n < end]
        choices = ([end - start] if end - start <= size else []) + borders
        counts.append(int(rng.choice(choices)))
    return np.array(counts)


def streamed(
    u: Utterances, seed: int, slots: int = SLOTS, hops: tuple[int, ...] = HOPS
) -> tuple[np.ndarray, int, FlowState]:
    rng, state = np.random.default_rng(seed), init_state(CONFIG, len(u.tokens), slots)
    starts, mel, num_hops = np.zeros(len(u.tokens), int), np.zeros_like(u.noise), 0
    while (starts < u.num_tokens).any():
        size = int(rng.choice(hops))
        counts = counts_of(u, starts, size, rng)
        if not counts.any():
            continue
        part, state = hop_step(state, u.hop(starts, counts, size))
        for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            mel[row, 2 * start : 2 * (start + count)] = part[row, : 2 * count]
            assert not np.any(part[row, 2 * count :])
        starts, num_hops = starts + counts, num_hops + 1
    np.testing.assert_array_equal(state.num_tokens, u.num_tokens)
    return mel, num_hops, state


@pytest.mark.parametrize("seed", range(16))
def test_any_chunking_gives_the_mel_of_the_whole_sequence(seed):
    u = Utterances.draw(seed)
    mel, num_hops, _ = streamed(u, seed)
    assert num_hops > 1
    np.testing.assert_allclose(mel, u.solved(), rtol=0, atol=1e-4)


@pytest.mark.full
def test_bounded_left_context_needs_no_more_room_than_it_says():
    u = Utterances.draw(100, num_rows=4)
    u.left[:], u.num_tokens[:] = [0, 4, 7, 11], MAX_TOKENS
    u.prompt[:] = [0, 5, 13, 2]
    u.prompt_mel[:] = 0
    mel, _, _ = streamed(u, 1, slots=13 + 11, hops=HOPS[1:2])
    np.testing.assert_allclose(mel, u.solved(), rtol=0, atol=1e-4)
    # Fewer slots than prompt and left context must show, or the test above could not fail.
    short, _, _ = streamed(u, 1, slots=14, hops=HOPS[1:2])
    assert np.abs(short - mel).max() > 1e-3


@pytest.mark.full
def test_room_can_grow_on_the_way():
    u = Utterances.draw(7)
    u.left[:], u.num_tokens[:] = NO_LEFT, 24
    u.chunk[:] = 3
    want = u.solved()
    state = init_state(CONFIG, len(u.tokens), 12)
    first, state = hop_step(state, u.hop(np.zeros(4, int), np.full(4, 12), 16))
    second, state = hop_step(grow_state(state, 24), u.hop(np.full(4, 12), np.full(4, 12), 16))
    got = np.concatenate([first[:, :24], second[:, :24]], axis=1)
    np.testing.assert_allclose(got, want[:, :48], rtol=0, atol=1e-4)


def test_a_row_that_waits_is_left_alone_and_its_mates_do_not_matter():
    u = Utterances.draw(3)
    u.chunk[:], u.num_tokens[:] = 5, 20
    start = init_state(CONFIG, 4, SLOTS)
    zeros = np.zeros(4, int)
    first, before = hop_step(start, u.hop(zeros, np.array([5, 5, 10, 0]), 16))
    other, _ = hop_step(start, u.hop(zeros, np.array([5, 0, 0, 5]), 16))
    np.testing.assert_array_equal(first[0], other[0])
    _, after = hop_step(before, u.hop(np.array([5, 5, 10, 0]), np.array([5, 0, 5, 10]), 16))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        axis = next(axis for axis, size in enumerate(new.shape) if size in (4, 8))  # of the rows, or of pairs of them
        for row in (1, 5)[: new.shape[axis] // 4]:
            np.testing.assert_array_equal(np.take(np.asarray(new), row, axis), np.take(np.asarray(old), row, axis))
        assert not np.array_equal(old, new)


def test_a_row_that_is_not_finite_stays_alone():
    u = Utterances.draw(4)
    u.chunk[:], u.num_tokens[:] = 5, 20
    counts, zeros = np.full(4, 5), np.zeros(4, int)
    want, wanted = hop_step(init_state(CONFIG, 4, SLOTS), u.hop(zeros, counts, 8))
    u.noise[0] = np.nan  # the first one, whose result orders the writes
    got, state = hop_step(init_state(CONFIG, 4, SLOTS), u.hop(zeros, counts, 8))
    assert np.isnan(got[0, :10]).all()
    np.testing.assert_array_equal(got[1:], want[1:])
    np.testing.assert_array_equal(state.cache.keys[:, [1, 2, 3, 5, 6, 7]], wanted.cache.keys[:, [1, 2, 3, 5, 6, 7]])


@pytest.mark.full
@pytest.mark.parametrize("scan_layers", [True, False])
def test_caches_are_written_in_place(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    u = Utterances.draw(5, num_rows=1)
    hop = jax.eval_shape(lambda: u.hop(np.zeros(1, int), np.full(1, 5), 5))
    params = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))

    def temporaries(num_slots: int) -> int:
        state = jax.eval_shape(lambda: init_state(config, 1, num_slots))
        donated = jax.jit(functools.partial(step, FlowMatching(config)), donate_argnums=1)
        return donated.lower(params, state, hop).compile().memory_analysis().temp_size_in_bytes

    # A copy of the caches would grow by all that they do; a layer's keys and values are copied, and there are 10 x 4.
    grown = state_bytes(config, 400) - state_bytes(config, 100)
    assert temporaries(400) - temporaries(100) < 0.3 * grown


@pytest.mark.full
@pytest.mark.parametrize(("left", "slots"), [(NO_LEFT, 1500), (50, 200)])
def test_a_minute_is_as_exact_as_a_second(left, slots):
    rng, num_tokens, prompt, size = np.random.default_rng(6), 1500, 87, 100
    frames = (1, 2 * num_tokens, CONFIG.num_mels)
    mel = rng.normal(size=frames).astype(np.float32)
    u = Utterances(
        tokens=rng.integers(0, CONFIG.num_speech_tokens, (1, num_tokens)),
        num_tokens=np.array([num_tokens]),
        prompt=np.array([prompt]),
        prompt_mel=np.where(np.arange(2 * num_tokens)[None, :, None] < 2 * prompt, mel, 0),
        noise=rng.normal(size=frames).astype(np.float32),
        speaker=rng.normal(size=(1, CONFIG.speaker_dim)).astype(np.float32),
        chunk=np.array([25]),
        left=np.array([left]),
    )
    got, num_hops, _ = streamed(u, 6, slots=slots, hops=(25, size))
    assert num_hops > 15
    np.testing.assert_allclose(got, u.solved(), rtol=0, atol=1e-4)


def test_what_a_second_of_audio_takes():
    state = init_state(CONFIG, 1, 7)
    assert state_bytes(CONFIG, 7) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    official = FlowMatchingConfig()
    second = state_bytes(official, 50) - state_bytes(official, 25)
    keys_and_values = (
        10 * 56 * 2 * 2 * 8 * 64 * 50 * 4
    )  # solver steps, layers, both, guidance, heads, sizes, frames, fp32
    assert keys_and_values < second < 1.02 * keys_and_values


@pytest.mark.parametrize(
    ("chunks", "offline", "stream"),
    [((0, 1, 25, 50), NO_CHUNK, 25), ((0, 1), NO_CHUNK, 1), ((1, 50, 25), 50, 25), ((0,), NO_CHUNK, NO_CHUNK)],
)
def test_masks_that_evaluations_hear(chunks, offline, stream):
    every = (-1,) * len(chunks)
    config = dataclasses.replace(CONFIG, mask_chunks=chunks, mask_lefts=every, mask_prompts=(0,) * len(chunks))
    assert (offline_mask(config).chunk, stream_mask(config).chunk) == (offline, stream)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "chunk 5 left 10"),
        ({"chunk": 5}, "chunk 5 left 10"),
        ({"chunk": 25}, "chunk 25 left 50"),
        ({"chunk": 25, "left": -1}, "chunk 25"),
        ({"left": 7}, "chunk 5 left 7"),
        ({"chunk": 8}, "chunk 8"),
        ({"chunk": 8, "left": 0}, "chunk 8 left 0"),
    ],
)
def test_the_mask_to_stream_under_is_a_trained_one_with_its_left_context(asked, name):
    masks = {"mask_chunks": (0, 5, 5, 25), "mask_lefts": (-1, 10, -1, 50), "mask_prompts": (0, 40, 0, 0)}
    assert choose_mask(dataclasses.replace(CONFIG, **masks), **asked).name == name
