"""Masks drawn as matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.nn.masks import (
    NO_CHUNK,
    NO_LEFT,
    ChunkMask,
    MaskSpec,
    causal_mask,
    chunk_array,
    key_mask,
    length_mask,
)


def test_length_mask():
    want = [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(length_mask(jnp.array([0, 2, 3]), 3), np.array(want, bool))


def test_length_mask_of_a_length_beyond_the_size_is_all_true():
    assert bool(length_mask(jnp.array([9]), 3).all())


def test_key_mask_broadcasts_over_heads_and_queries():
    mask = key_mask(length_mask(jnp.array([1, 2]), 3))
    assert mask.shape == (2, 1, 1, 3)
    np.testing.assert_array_equal(mask[1, 0, 0], [True, True, False])


def test_causal_mask():
    np.testing.assert_array_equal(causal_mask(3, 3)[0, 0], np.tril(np.ones((3, 3), bool)))


def test_causal_mask_of_a_cache_step_sees_everything_up_to_its_position():
    np.testing.assert_array_equal(causal_mask(1, 5, 2)[0, 0], [[True, True, True, False, False]])


def test_causal_mask_of_a_chunk_continues_the_diagonal():
    np.testing.assert_array_equal(causal_mask(2, 4, jnp.int32(1))[0, 0], [[1, 1, 0, 0], [1, 1, 1, 0]])


SEGMENTS = jnp.array([[1, 1, 2, 0], [3, 3, 3, 3]])


def test_segments_see_themselves_and_padding_sees_padding():
    full, causal = (MaskSpec(kind=kind, segments=SEGMENTS).array(4, 4) for kind in ("full", "causal"))
    assert full.shape == causal.shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(full[0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert full[1].all()
    np.testing.assert_array_equal(causal[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(causal[1, 0], np.tril(np.ones((4, 4), bool)))


def test_without_segments_a_spec_is_its_kind():
    assert MaskSpec().array(2, 3).all()
    np.testing.assert_array_equal(MaskSpec(kind="causal").array(2, 3), causal_mask(2, 3))


def test_no_row_is_ever_empty():
    segments = jnp.asarray(np.random.default_rng(1).integers(0, 3, (5, 11)), jnp.int32)
    assert MaskSpec(kind="causal", segments=segments).array(11, 11).any(-1).all()


CHUNKS = MaskSpec(kind="chunk", rows=(ChunkMask(chunk=2, left=0), ChunkMask(chunk=3)), segments=SEGMENTS)


@pytest.mark.parametrize("spec", [MaskSpec(kind="causal", segments=SEGMENTS), CHUNKS, CHUNKS.as_data(2)])
def test_a_spec_passes_through_jit_and_scan_with_its_kind(spec):
    got = jax.jit(lambda m: jax.lax.scan(lambda c, _: (c, c.array(4, 4)), m, length=2)[1])(spec)
    np.testing.assert_array_equal(got[1], spec.array(4, 4))


def test_a_spec_that_cannot_be_is_said():
    with pytest.raises(ValueError, match="'chunky' is unknown; known: full, causal"):
        MaskSpec(kind="chunky")
    with pytest.raises(ValueError, match="segments of length 4 cannot mask 4 queries and 5 keys"):
        MaskSpec(segments=SEGMENTS).array(4, 5)


def drawn(mask, length):
    """`ChunkMask` by its definition, one pair of positions at a time."""
    out = np.zeros((length, length), bool)
    for i in range(length):
        first = i // mask.chunk * mask.chunk
        for j in range(length):
            is_near = mask.left is None or j >= first - mask.left or j < mask.prompt
            out[i, j] = j < first + mask.chunk and is_near
    return out


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (ChunkMask(chunk=2), ["11..", "11..", "1111", "1111"]),
        (ChunkMask(chunk=1), ["1...", "11..", "111.", "1111"]),
        (ChunkMask(chunk=NO_CHUNK), ["1111"] * 4),
        (ChunkMask(chunk=2, left=1), ["11..", "11..", ".111", ".111"]),
        (ChunkMask(chunk=1, left=0, prompt=1), ["1...", "11..", "1.1.", "1..1"]),
    ],
)
def test_chunk_masks_as_matrices(mask, want):
    want = np.array([[sign == "1" for sign in row] for row in want])
    np.testing.assert_array_equal(MaskSpec(kind="chunk", rows=(mask,)).array(4, 4)[0, 0], want)
    np.testing.assert_array_equal(drawn(mask, 4), want)


def random_masks(rng, count):
    lefts = [None, 0, 3, 8]
    draw = lambda: ChunkMask(  # noqa: E731
        chunk=int(rng.choice([1, 2, 3, 7, NO_CHUNK])), left=lefts[rng.integers(4)], prompt=int(rng.integers(0, 6))
    )
    return tuple(draw() for _ in range(count))


@pytest.mark.parametrize("seed", range(6))
def test_static_masks_data_and_definition_agree_and_no_row_is_empty(seed):
    rng = np.random.default_rng(seed)
    rows, length = random_masks(rng, 3), 19
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (6, length)))[:, ::-1].copy(), jnp.int32)
    static = MaskSpec(kind="chunk", rows=rows, segments=segments)
    got = np.asarray(static.array(length, length))[:, 0]
    same = np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]
    np.testing.assert_array_equal(got, np.stack([drawn(rows[r % 3], length) for r in range(6)]) & same)
    np.testing.assert_array_equal(static.as_data(6).array(length, length)[:, 0], got)
    assert got.any(axis=-1).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_scaled_mask_is_the_mask_of_repeated_positions(seed):
    rows = random_masks(np.random.default_rng(seed), 4)
    for spec in (MaskSpec(kind="chunk", rows=rows), MaskSpec(kind="chunk", rows=rows).as_data(4)):
        small, large = spec.array(11, 11, 4), spec.scaled(2).array(22, 22, 4)
        np.testing.assert_array_equal(large, np.kron(small, np.ones((2, 2), bool)))


def test_positions_of_a_cache_need_no_order_and_empty_slots_are_never_seen():
    keys = jnp.array([[4, -1, 0, 7, 2]])
    number = lambda n: jnp.array([n])  # noqa: E731
    got = chunk_array(number(2), number(1), number(1), jnp.array([[5]]), keys)
    np.testing.assert_array_equal(got[0, 0], [[True, False, True, False, False]])
    everything = chunk_array(number(NO_CHUNK), number(NO_LEFT), number(0), jnp.array([[5]]), keys)
    np.testing.assert_array_equal(everything[0, 0], [[True, False, True, True, True]])


def test_chunk_masks_that_cannot_be_meant():
    for wrong in ({"chunk": 0}, {"chunk": 2, "left": -1}, {"chunk": 2, "prompt": -3}):
        with pytest.raises(ValueError, match="at least"):
            ChunkMask(**wrong)
    data = {name: jnp.array([1]) for name in ("chunk", "left", "prompt")}
    for wrong in ({"kind": "chunk"}, {"kind": "full"} | data, {"kind": "chunk", "rows": (ChunkMask(chunk=1),)} | data):
        with pytest.raises(ValueError, match="never both"):
            MaskSpec(**wrong)
    with pytest.raises(ValueError, match="without segments"):
        MaskSpec(kind="causal").scaled(2)


def test_chunk_masks_have_names():
    masks = [
        ChunkMask(chunk=NO_CHUNK),
        ChunkMask(chunk=1),
        ChunkMask(chunk=25),
        ChunkMask(chunk=25, left=50, prompt=75),
    ]
    assert [mask.name for mask in masks] == ["all", "causal", "chunk 25", "chunk 25 left 50 prompt 75"]
