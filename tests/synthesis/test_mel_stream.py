"""Voices and requests as the caller has them: streams equal whole requests, and what cannot be done is one clear line."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.models.flow_matching import config as flow_config
from cv2jax.models.flow_matching.stream import recycle, step_program
from cv2jax.nn.masks import NO_CHUNK, ChunkMask
from cv2jax.synthesis import mel_stream as stream_module
from cv2jax.synthesis.mel_solver import MelSolver, NonFiniteMels
from cv2jax.synthesis.mel_stream import MelStreams
from cv2jax.synthesis.prompt import MelRequest, Prompt, check_tokens
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, LOOKAHEAD
from cv2jax.tasks.stages import make_mel_stage
from tests.models.golden_flow import random_params, small_config

CONFIG = small_config()
PARAMS = random_params(CONFIG)
STAGE = make_mel_stage(CONFIG, PARAMS)
FULL, BOUNDED = ChunkMask(chunk=5), ChunkMask(chunk=5, left=4)


@functools.cache
def streams(mask: ChunkMask) -> MelStreams:
    return MelStreams(STAGE, mask, hop_sizes=(10,))


@functools.cache
def solver(mask: ChunkMask) -> MelSolver:
    return MelSolver(STAGE, mask, max_rows=4, bucket=40)


def make_voice(num_tokens: int, seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    return Prompt(
        speaker_embedding=rng.normal(size=CONFIG.speaker_dim).astype(np.float32),
        speech_tokens=rng.integers(0, CONFIG.num_speech_tokens, num_tokens),
        mel=rng.normal(size=(2 * num_tokens, CONFIG.num_mels)).astype(np.float32),
        key=jax.random.key(100 + seed),
        name="ann",
    )


def make_tokens(num_tokens: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.num_speech_tokens, num_tokens)


def hear(stream, tokens: np.ndarray, seed: int) -> np.ndarray:
    """All of the tokens in random hops; the last one of any length."""
    rng, parts, place = np.random.default_rng(seed), [], 0
    while not stream.has_ended:
        num = stream.num_to_border() + 5 * int(rng.integers(0, 3))
        if place + num + LOOKAHEAD > len(tokens):
            parts.append(stream.hop(tokens[place:]))
        else:
            parts.append(stream.hop(tokens[place : place + num], tokens[place + num : place + num + LOOKAHEAD]))
        place += num
    return np.concatenate(parts)


@pytest.mark.parametrize("mask", [FULL, BOUNDED], ids=["full", "bounded"])
@pytest.mark.parametrize("num_prompt", [0, 2, 10, 12, 13])  # none, less than a chunk, whole, look-ahead outside, inside
def test_a_stream_is_the_whole_request_with_any_prompt(mask, num_prompt):
    voice, tokens = make_voice(num_prompt), make_tokens(24)
    solved = streams(mask).enroll(voice)
    assert solved.num_solved == {0: 0, 2: 0, 10: 5, 12: 5, 13: 10}[num_prompt]
    for seed in range(2):  # a voice serves many requests
        key = jax.random.key(seed)
        [want] = solver(mask)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
        got = hear(streams(mask).start(solved, key), tokens, seed)
        assert got.shape == (48, CONFIG.num_mels)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    other = hear(streams(mask).start(solved, jax.random.key(9)), tokens, 0)
    assert np.abs(other - got).max() > 1e-2


@pytest.mark.parametrize("mask", [ChunkMask(chunk=1), ChunkMask(chunk=1, left=3)], ids=lambda mask: mask.name)
def test_a_causal_stream_ends_a_hop_anywhere(mask):
    voice, tokens, key = make_voice(7), make_tokens(24), jax.random.key(2)
    stream = streams(mask).start(streams(mask).enroll(voice), key)
    assert stream.num_to_border() == 1
    got = [stream.hop(tokens[:1], tokens[1:4]), stream.hop(tokens[1:13], tokens[13:16]), stream.hop(tokens[13:])]
    [want] = solver(mask)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=1e-4)


@pytest.mark.full
def test_a_bounded_stream_needs_no_more_room_than_prompt_and_left_context(monkeypatch):
    monkeypatch.setattr(stream_module, "_BOUNDED_ROOM", 1)
    voice, tokens, key = make_voice(13), make_tokens(64), jax.random.key(4)
    solved = streams(BOUNDED).enroll(voice)
    assert solved.room == 17
    [want] = solver(BOUNDED)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    got = hear(streams(BOUNDED).start(solved, key), tokens, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.full
def test_a_stream_in_bfloat16_is_near_the_whole_request():
    config = small_config(dtype="bfloat16")
    voice, tokens, key = make_voice(7), make_tokens(24), jax.random.key(2)
    stage = make_mel_stage(config, PARAMS)
    half = MelStreams(stage, FULL, hop_sizes=(10,))
    [want] = MelSolver(stage, FULL, bucket=40)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    got = hear(half.start(half.enroll(voice), key), tokens, 0)
    assert got.dtype == want.dtype == np.float32
    [exact] = solver(FULL)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    # As far from each other as each is from fp32.
    assert np.abs(got - want).mean() <= 1.5 * np.abs(exact - want).mean()


@pytest.mark.full
def test_the_official_chunk_with_a_prompt_of_87_tokens():
    voice, tokens, mask, key = make_voice(87), make_tokens(70), ChunkMask(chunk=25), jax.random.key(3)
    assert MelStreams(STAGE, mask).hop_sizes == (25, 50, 100)
    official = MelStreams(STAGE, mask, hop_sizes=(25,))  # one program; longer hops are cut
    solved = official.enroll(voice)
    assert solved.num_solved == 75
    stream = official.start(solved, key)
    assert stream.num_to_border() == 13
    [want] = solver(mask)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    got = [stream.hop(tokens[:13], tokens[13:16]), stream.hop(tokens[13:63], tokens[63:66]), stream.hop(tokens[63:])]
    assert [len(part) for part in got] == [26, 100, 14]
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=1e-4)


@pytest.mark.full
def test_caches_grow_with_what_is_seen_and_bounded_ones_do_not(monkeypatch):
    monkeypatch.setattr(stream_module, "_ROOM", 40)
    voice, tokens, key = make_voice(7), make_tokens(64), jax.random.key(0)
    rooms = {}
    for mask in (FULL, BOUNDED):
        these = MelStreams(STAGE, mask, hop_sizes=(10,))
        stream = these.start(these.enroll(voice), key)
        first = stream.hop(tokens[:58], tokens[58:61])
        rooms[mask] = stream._room
        got = np.concatenate([first, stream.hop(tokens[58:])])
        np.testing.assert_allclose(
            got, solver(mask)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])[0], rtol=0, atol=1e-4
        )
    assert rooms == {FULL: 80, BOUNDED: 25}


@pytest.mark.full
def test_official_noise_counts_from_the_start_of_the_prompt():
    config = small_config(num_mels=80)
    params, tokens, mask = random_params(config), make_tokens(12), ChunkMask(chunk=5)
    embedding, key = np.ones(config.speaker_dim, np.float32), jax.random.key(0)
    voice = Prompt(speaker_embedding=embedding, speech_tokens=make_tokens(9), mel=np.ones((18, 80), np.float32))
    stage = make_mel_stage(config, params, use_official_noise=True)
    both = MelStreams(stage, mask, hop_sizes=(10,))
    [want] = MelSolver(stage, mask, bucket=21)([MelRequest(voice=voice, speech_tokens=tokens)])
    got = hear(both.start(both.enroll(voice), key), tokens, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    [drawn] = MelSolver(make_mel_stage(config, params), mask, bucket=21)(
        [MelRequest(voice=voice, speech_tokens=tokens)]
    )
    assert np.abs(drawn - want).max() > 1e-2
    with pytest.raises(UserError, match=r"long: has 15002 frames with its prompt, the official noise 15000 \(300 s\)"):
        MelSolver(stage, mask)([MelRequest(voice=voice, speech_tokens=make_tokens(7492), name="long")])
    with pytest.raises(UserError, match="the official noise has 80 mel bins, the model 8"):
        make_mel_stage(CONFIG, PARAMS, use_official_noise=True)


def test_a_request_does_not_depend_on_its_batch():
    requests = [
        MelRequest(voice=make_voice(p, p), speech_tokens=make_tokens(n, n), key=jax.random.key(n), name=f"r{n}")
        for p, n in ((0, 3), (7, 21), (12, 30), (0, 38), (3, 60))
    ]
    together = MelSolver(STAGE, FULL, max_rows=4, bucket=80)(requests)
    assert [len(mel) for mel in together] == [6, 42, 60, 76, 120]
    for request, mel in zip(requests, together, strict=True):
        np.testing.assert_allclose(mel, solver(FULL)([request])[0], rtol=0, atol=1e-5)


def test_what_a_voice_cannot_be():
    voice = make_voice(4)
    fields = {"speaker_embedding": voice.speaker_embedding, "speech_tokens": voice.speech_tokens, "mel": voice.mel}
    bad_mel = np.where(np.arange(8)[:, None] == 5, np.nan, voice.mel)
    for changes, message in (
        ({"mel": voice.mel[:7]}, r"ann: the prompt's mel has shape \(7, 8\); its 4 tokens need \(8, 8\)"),
        ({"mel": None}, r"the prompt's mel has shape \(0, 8\)"),
        ({"mel": bad_mel}, r"the prompt's mel is not finite at \[5, 0\]"),
        ({"speech_tokens": np.array([3, 40, 1, 2])}, r"ann: speech token 40 at place 1 is outside 0 … 39"),
        ({"speaker_embedding": np.ones(192)}, r"has shape \(192,\), the model takes \(6,\)"),
    ):
        with pytest.raises(UserError, match=message):
            streams(FULL).enroll(Prompt(name="ann", **(fields | changes)))
    with pytest.raises(UserError, match="r: has no speech tokens"):
        solver(FULL)([MelRequest(voice=voice, speech_tokens=make_tokens(0), name="r")])
    for tokens in (np.array([1.0, 2.0]), np.array([[1, 2]])):
        with pytest.raises(UserError, match=rf"r: speech tokens of shape {re.escape(str(tokens.shape))} and type"):
            check_tokens(tokens, STAGE, "r")


@pytest.mark.full
def test_a_warm_stream_compiles_nothing(monkeypatch):
    monkeypatch.setattr(stream_module, "_ROOM", 25)
    voice, tokens = make_voice(7), make_tokens(64)
    compiled = step_program(CONFIG)
    compiled.clear_cache()
    these = MelStreams(STAGE, FULL, hop_sizes=(5, 40))
    solved = these.enroll(voice)
    these.warm_up(solved, len(tokens))
    assert compiled._cache_size() == 6  # 25, 50 and 100 slots
    counts = lambda: (compiled._cache_size(), recycle._cache_size())  # noqa: E731
    warm = counts()
    for _ in range(2):  # the second one in the memory of the first
        assert len(hear(these.start(solved, jax.random.key(0)), tokens, 0)) == 128
    assert counts() == warm
    hear(these.start(solved, jax.random.key(0)), make_tokens(150), 0)
    longer = counts()
    assert longer > warm
    for _ in range(2):  # not in what the longer one has grown
        hear(these.start(solved, jax.random.key(0)), tokens, 0)
    assert counts() == longer


@pytest.mark.full
@pytest.mark.parametrize("mask", [FULL, BOUNDED], ids=["full", "bounded"])
def test_a_request_takes_the_memory_of_one_that_has_ended(monkeypatch, mask):
    monkeypatch.setattr(stream_module, "_ROOM", 25)
    monkeypatch.setattr(stream_module, "_BOUNDED_ROOM", 10)
    these, key = MelStreams(STAGE, mask, hop_sizes=(10,)), jax.random.key(3)
    lengths = (60, 7, 30)  # the second one in what the first one has grown
    for voice, length in zip((make_voice(n, n) for n in (12, 0, 13)), lengths, strict=True):
        solved, tokens = these.enroll(voice), make_tokens(length)
        taken, other = these.start(solved, key), these.start(solved, key)  # two at once do not share any
        [want] = solver(mask)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
        for stream in (taken, other):
            np.testing.assert_allclose(hear(stream, tokens, length), want, rtol=0, atol=1e-4)
        free = these._kept[-1][1].cache.keys
        assert len(these._kept) == 1
        again = these.start(solved, key)
        assert free.is_deleted()
        np.testing.assert_allclose(hear(again, tokens, 0), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("room", "is_kept"), [(100, True), (125, False)])
def test_the_memory_of_a_request_is_kept_where_its_voice_would_take_it_again(room, is_kept):
    these, state = MelStreams(STAGE, FULL), STAGE.init_state(1)
    these.keep_state(state, room, 25)
    assert len(these._kept) == is_kept


def test_batches_have_no_more_rows_than_is_allowed():
    voice, shapes = make_voice(0), []
    few = MelSolver(STAGE, FULL, max_rows=3, bucket=10)
    few._solve = lambda batch: shapes.append(batch.noise.shape) or batch.noise
    assert len(few([MelRequest(voice=voice, speech_tokens=make_tokens(5))] * 5)) == 5
    assert shapes == [(3, 20, 8), (2, 20, 8)]


def test_a_hop_that_cannot_be_leaves_the_stream_as_it_was():
    voice, tokens, key = make_voice(7), make_tokens(24), jax.random.key(5)
    stream = streams(FULL).start(streams(FULL).enroll(voice), key, "req")
    ahead = tokens[3:6]
    for arguments, message in (
        ((tokens[:4], ahead), "req: a hop of 4 tokens ends inside a chunk, counted from the start.*give 3, or a mul"),
        ((tokens[:0], ahead), "req: has no speech tokens"),
        ((tokens[:0],), "req: has no speech tokens"),
        ((np.array([1, -1, 1]), ahead), "req: speech token -1 at place 1 is outside 0 … 39"),
        ((tokens[:3], ahead[:2]), "req: 2 tokens of look-ahead; give 3, or None with the last hop"),
        ((tokens[:3], np.array([1, 2, 77])), "req, look-ahead: speech token 77 at place 2"),
    ):
        with pytest.raises(UserError, match=message):
            stream.hop(*arguments)
    first = stream.hop(tokens[:3], ahead)
    with pytest.raises(UserError, match=r"req: goes on with tokens \[\d+, \d+, \d+\]; the hop before looked ahead at"):
        stream.hop((tokens[3:] + 1) % 40)
    with pytest.raises(UserError, match="req: goes on with"):
        stream.hop(tokens[3:5])
    [want] = solver(FULL)([MelRequest(voice=voice, speech_tokens=tokens, key=key)])
    got = np.concatenate([first, hear(stream, tokens[3:], 1)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="ann: was solved for another mask or model"):
        streams(BOUNDED).start(streams(FULL).enroll(voice), key)
    with pytest.raises(UserError, match="req: has ended"):
        stream.hop(tokens)


def test_a_mel_that_is_not_finite_is_reported_with_its_place():
    broken = jax.tree.map(jnp.copy, PARAMS)
    table = broken["encoder"]["token_embedding"]
    broken["encoder"]["token_embedding"] = table.at[39].set(jnp.nan)
    tokens = np.where(make_tokens(20) == 39, 0, make_tokens(20))
    tokens[9] = 39  # seen by the look-ahead of token 6, in the chunk of tokens 5 … 9
    voice = make_voice(0)
    # In one solve the weights of what is masked are 0, and 0 times no number is none.
    stage = make_mel_stage(CONFIG, broken)
    given = {"fine": np.zeros(7, np.int32), "req": tokens}
    requests = [MelRequest(voice=voice, speech_tokens=ids, name=name) for name, ids in given.items()]
    message = r"^req: the mel is not finite from frame 0 \(0.00 s, speech token 0\) on"
    with pytest.raises(NonFiniteMels, match=message) as found:
        MelSolver(stage, FULL, bucket=20)(requests)
    assert "fine" not in str(found.value)
    assert [None if mel is None else mel.shape for mel in found.value.mels] == [(14, 8), None]
    assert np.isfinite(found.value.mels[0]).all()
    these = MelStreams(stage, FULL, hop_sizes=(10,))
    stream = these.start(these.enroll(voice), jax.random.key(0), "req")
    assert np.isfinite(stream.hop(tokens[:5], tokens[5:8])).all()
    with pytest.raises(UserError, match=r"req: the mel is not finite from frame 10 \(0.20 s, speech token 5\) on"):
        stream.hop(tokens[5:10], tokens[10:13])
    assert stream.has_ended
    with pytest.raises(UserError, match="ann: the mel is not finite from frame 0"):
        these.enroll(
            Prompt(name="ann", speaker_embedding=voice.speaker_embedding, speech_tokens=tokens, mel=np.ones((40, 8)))
        )


def test_masks_that_were_not_trained_are_named_with_those_that_were(caplog):
    config = small_config(mask_chunks=(0, 5), mask_lefts=(-1, 4), mask_prompts=(0, -1))
    with caplog.at_level("WARNING"):
        MelStreams(make_mel_stage(config, PARAMS), ChunkMask(chunk=5, left=4))
        MelSolver(make_mel_stage(config, PARAMS), ChunkMask(chunk=NO_CHUNK))
    assert not caplog.records
    with caplog.at_level("WARNING"):
        MelStreams(make_mel_stage(config, PARAMS), ChunkMask(chunk=7))
    [record] = caplog.records
    assert record.getMessage() == ("mask chunk 7: the flow was not trained for it, only for all, chunk 5 left 4")


def test_masks_and_sizes_that_cannot_stream():
    with pytest.raises(UserError, match=r"trained without chunks, .* \(--offline\), .*--chunk 25"):
        MelStreams(STAGE, ChunkMask(chunk=NO_CHUNK))
    for sizes in ((5, 12), (0,)):
        with pytest.raises(UserError, match="must be multiples of the chunk, 5 tokens"):
            MelStreams(STAGE, FULL, hop_sizes=sizes)


@pytest.mark.parametrize(("chunk", "sizes"), [(50, (50, 100)), (25, (25, 50, 100)), (1, (25, 50, 100)), (100, (100,))])
def test_of_the_programs_of_a_bundle_those_of_whole_chunks_are_taken(chunk, sizes):
    stage = dataclasses.replace(STAGE, hop_sizes=(25, 50, 100), trained=(ChunkMask(chunk=25), ChunkMask(chunk=50)))
    assert MelStreams(stage, ChunkMask(chunk=chunk)).hop_sizes == sizes
    assert MelStreams(stage, ChunkMask(chunk=30), hop_sizes=(30,)).hop_sizes == (30,)  # as asked


def test_a_chunk_without_programs_is_refused_with_those_that_have_some():
    trained = (ChunkMask(chunk=NO_CHUNK), ChunkMask(chunk=25), ChunkMask(chunk=50), ChunkMask(chunk=30))
    stage = dataclasses.replace(STAGE, hop_sizes=(25, 50, 100), trained=trained)
    with pytest.raises(
        UserError, match=r"--chunk 30: .* 25, 50, 100 tokens, none of whole chunks; give --chunk 25 or 50"
    ):
        MelStreams(stage, ChunkMask(chunk=30))
    with pytest.raises(UserError, match="give a chunk that divides one of these"):
        MelStreams(dataclasses.replace(stage, trained=trained[-1:]), ChunkMask(chunk=30))


def test_a_stage_counts_as_the_model_does():
    assert (FRAMES_PER_TOKEN, LOOKAHEAD) == (flow_config.FRAMES_PER_TOKEN, flow_config.LOOKAHEAD)
