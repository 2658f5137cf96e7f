"""Whole and arriving text against a teacher-forced forward; mates, slots, the end of the context, options, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.models.text_speech_lm import decode, sequence
from cv2jax.models.text_speech_lm.model import TextSpeechLm, init_params
from cv2jax.nn.masks import causal_mask
from cv2jax.nn.stack import stack_layers
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.synthesis import speech_stream
from cv2jax.synthesis.sampling import RequestSampler, SamplingOptions
from cv2jax.synthesis.speech_stream import SpeechRequest, SpeechResult, SpeechStreams
from cv2jax.synthesis.stages import STATUS_NAMES
from cv2jax.tasks.stages import make_speech_stage
from tests.models.golden_lm import golden_config, golden_params

CONFIG, SAMPLER = golden_config(), RequestSampler()
EOS = sequence.eos_id(CONFIG.num_speech_tokens)


@pytest.fixture(scope="module")
def params():
    """Random weights of some spread: those of the golden model repeat one token greedily."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.15 * rng.normal(size=a.shape), jnp.float32), golden_params(CONFIG))


def cut(tokens, rng):
    """Random pieces, some of them empty."""
    borders = np.sort(rng.integers(0, len(tokens) + 1, rng.integers(0, 8)))
    return np.split(np.asarray(tokens, np.int32), borders)


def request(seed, num_text, num_prompt_text=0, num_prompt_speech=0, **settings):
    rng = np.random.default_rng(seed)
    return SpeechRequest(
        text_tokens=rng.integers(0, 512, num_text),
        prompt_text_tokens=rng.integers(0, 512, num_prompt_text),
        prompt_speech_tokens=rng.integers(0, 61, num_prompt_speech),
        **settings,
    )


SIZES = [(7,), (12, 6, 17), (3, 2, 9), (10, 5, 15), (1,), (5,)]
REQUESTS = [request(i, *sizes, max_length=50) for i, sizes in enumerate(SIZES)]
DRAWS = SAMPLER.options(SamplingOptions())
GREEDY = SAMPLER.options(SamplingOptions(temperature=0.0))


def generate(params, requests=REQUESTS, **settings):
    settings = {"options": DRAWS, "seed": 5} | settings
    made = {name: settings.pop(name) for name in ("num_steps", "max_positions") if name in settings}
    return speech_stream.generate(stage_of(params, **made), requests, **settings)


def stage_of(params, **settings):
    return make_speech_stage(CONFIG, params, SAMPLER, **({"num_steps": 4} | settings))


@pytest.fixture(scope="module")
def wanted(params):
    """By whether the text arrives: the results of REQUESTS."""
    return {arriving: generate(params, stream=arriving) for arriving in (False, True)}


def same(got, want):
    assert [r.status for r in got] == [r.status for r in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.speech_tokens, b.speech_tokens)


@jax.jit
def forward(params, tokens, kinds):
    positions, mask = jnp.arange(128)[None], causal_mask(128, 128)
    return TextSpeechLm(decode.decoder_config(CONFIG)).apply({"params": params}, tokens, kinds, positions, mask).logits


def teacher_forced(params, row):
    batch = sequence.collate([row], 128)
    return np.asarray(forward(params, batch["token"], batch["kind"])[0, : len(row)])


@pytest.mark.parametrize("arriving", [False, True])
def test_greedy_tokens_are_the_argmax_of_a_teacher_forced_forward(params, arriving):
    requests = [request(i, *sizes, min_length=2, max_length=50) for i, sizes in enumerate(SIZES[:5])]
    results = generate(params, requests, options=GREEDY, stream=arriving)
    for asked, result in zip(requests, results, strict=True):
        row = sequence.build_row(
            np.concatenate([asked.prompt_text_tokens, asked.text_tokens]),
            np.concatenate([asked.prompt_speech_tokens, result.speech_tokens]),
            bistream=arriving,
            text_vocabulary_size=512,
            num_speech_tokens=61,
        )
        logits = teacher_forced(params, row)
        speech = np.flatnonzero(row.kind == sequence.SPEECH)[len(asked.prompt_speech_tokens) :]
        in_tail = speech > np.flatnonzero(row.token + 10 * row.kind == sequence.TASK)[0]
        allowed = np.asarray(logits[speech - 1]).copy()
        allowed[:, EOS + 1 :] = -np.inf
        ends = in_tail & (np.arange(len(speech)) >= 2) if arriving else np.arange(len(speech)) >= 2
        allowed[~ends, EOS] = -np.inf
        np.testing.assert_array_equal(result.speech_tokens, allowed.argmax(axis=1))
        if result.status == "ok":
            assert int(np.argmax(logits[-1, : EOS + 1])) == EOS
        else:
            assert (result.status, len(speech)) == ("hit_limit", 50)
    assert len({tuple(r.speech_tokens[:8]) for r in results}) == 5
    assert len(set(results[0].speech_tokens)) > 3


@pytest.mark.parametrize("arriving", [False, True])
def test_tokens_depend_on_no_mates_slots_or_hops(params, wanted, arriving):
    want = wanted[arriving]
    assert {r.status for r in want} <= {"ok", "hit_limit"}
    assert all(2 * len(a.text_tokens) <= len(r.speech_tokens) <= 50 for a, r in zip(REQUESTS, want, strict=True))
    same(generate(params, stream=arriving, num_steps=25, max_slots=2), want)
    stacked = params | {"backbone": stack_layers(params["backbone"])}
    same(generate(stacked, REQUESTS[:1], stream=arriving, num_steps=1), want[:1])
    other = generate(params, REQUESTS[:1], seed=6, stream=arriving, num_steps=1)[0]
    assert not np.array_equal(other.speech_tokens[:10], want[0].speech_tokens[:10])


def test_text_in_random_pieces_gives_the_tokens_of_one_piece(params, wanted):
    want, rng = wanted[True], np.random.default_rng(0)
    for _ in range(3):
        streams = SpeechStreams(stage_of(params), options=DRAWS, num_slots=8)
        slots = rng.permutation(8)[: len(REQUESTS)]
        pieces = [cut(r.text_tokens, rng) for r in REQUESTS]
        for i, slot in enumerate(slots):
            opened = dataclasses.replace(REQUESTS[i], text_tokens=pieces[i].pop(0))
            streams.open(int(slot), opened, jax.random.fold_in(jax.random.key(5), i))
        drawn, status, flushed = [[] for _ in slots], ["running"] * len(slots), [False] * len(slots)
        while "running" in status:
            for i in np.flatnonzero(rng.random(len(slots)) < 0.3):
                if pieces[i]:
                    streams.push_text(int(slots[i]), pieces[i].pop(0))
                elif not flushed[i]:
                    streams.flush(int(slots[i]))
                    flushed[i] = True
            for slot, result in streams.advance().items():
                i = slots.tolist().index(slot)
                drawn[i].extend(result.speech_tokens)
                status[i] = result.status
        same(
            [SpeechResult(speech_tokens=np.array(d, np.int32), status=s) for d, s in zip(drawn, status, strict=True)],
            want,
        )
        assert status == [r.status for r in want]


def test_a_slot_is_as_new_for_its_next_request(params, wanted):
    streams = SpeechStreams(stage_of(params, num_steps=1), options=DRAWS, arriving=False)
    want = wanted[False]
    for i in (1, 0):
        streams.open(0, REQUESTS[i], jax.random.fold_in(jax.random.key(5), i), flushed=True)
        tokens = []
        while streams.free == []:
            result = streams.advance()[0]
            tokens.extend(result.speech_tokens)
            if result.status != "running":
                streams.close(0)
        np.testing.assert_array_equal(tokens, want[i].speech_tokens)


def test_options_and_lengths_belong_to_a_request(params, wanted):
    others = [request(0, 7, options=GREEDY, max_length=9, min_length=9), request(0, 7, max_length=4)]
    results = generate(params, [REQUESTS[0], *others, *REQUESTS[3:5]])
    same([results[i] for i in (0, 3, 4)], [wanted[False][i] for i in (0, 3, 4)])
    greedy = generate(params, [request(0, 7, min_length=20, max_length=30)] * 5, options=GREEDY, seed=77)[4]
    np.testing.assert_array_equal(results[1].speech_tokens, greedy.speech_tokens[:9])
    assert [(r.status, len(r.speech_tokens)) for r in results[1:3]] == [("hit_limit", 9), ("hit_limit", 4)]


def test_a_mesh_gives_the_same_tokens(params):
    stacked = params | {"backbone": stack_layers(params["backbone"])}
    requests = [request(i, 5 + i, max_length=17, min_length=1) for i in range(2)]
    want = generate(params, requests, stream=True)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    _, shardings = abstract_state(lambda key: init_params(CONFIG, key), mesh)
    placed = jax.tree.map(jax.device_put, stacked, shardings)
    with jax.set_mesh(mesh), axis_rules():
        before = decode.decode._cache_size()
        got = generate(placed, requests, stream=True)
        assert decode.decode._cache_size() == before + 1
    same(got, want)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(0, 0, 4), r"^u: has no text tokens"),
        (request(0, 3, max_length=40_000), r"^u: .* take 40005 positions, more than 32768"),
        (request(0, 3, min_length=5, max_length=4), r"^u: min_length=5, max_length=4"),
        (request(0, 3, max_length=0), r"^u: min_length=0, max_length=0"),
        (SpeechRequest(text_tokens=np.array([5, 512])), r"^u: text token 512 at 1 lies outside"),
        (
            SpeechRequest(text_tokens=np.array([5]), prompt_speech_tokens=np.array([61])),
            r"^u: speech token 61 at 0 lies outside",
        ),
    ],
)
def test_errors(params, asked, message):
    with pytest.raises(UserError, match=message) as error:
        generate(params, [REQUESTS[0], dataclasses.replace(asked, name="u")])
    assert "\n" not in str(error.value)


def make_streams(params, num_steps=7, max_positions=32_768, **settings):
    stage = stage_of(params, num_steps=num_steps, max_positions=max_positions)
    return SpeechStreams(stage, **({"options": DRAWS} | settings))


def run(streams, slot=0):
    """All that the request draws until it ends or waits."""
    tokens, status = [], "running"
    while status == "running":
        result = streams.advance().get(slot)
        if result is None:
            return tokens, "waiting"
        tokens.extend(result.speech_tokens.tolist())
        status = result.status
    return tokens, status


@pytest.mark.parametrize("arriving", [False, True])
def test_a_text_that_fits_is_spoken_up_to_the_end_of_the_context(params, monkeypatch, arriving):
    monkeypatch.setattr(decode, "grow", None)  # the smallest cache holds such a context
    room = 128 - 2 - 20 - 5
    asked = [request(1, 20, 2, 3, min_length=room), request(2, 20, 2, 3, max_length=room)]
    results = generate(params, asked, stream=arriving, num_steps=25, max_positions=128)
    assert (results[0].status, len(results[0].speech_tokens)) == ("hit_limit", room)
    for settings in ({"min_length": room + 1}, {"max_length": room + 1}):
        with pytest.raises(UserError, match=r"^request: .* 102 speech tokens take 129 positions, more than 128; split"):
            generate(params, [request(1, 20, 2, 3, **settings)], stream=arriving, max_positions=128)
    with pytest.raises(UserError, match="at least 84 speech tokens take 133 positions"):
        generate(
            params, [request(1, 42, 2, 3)], stream=arriving, max_positions=128
        )  # of which two a text token is the least


def test_text_is_refused_where_it_leaves_no_room_and_the_request_goes_on(params):
    streams, text = make_streams(params, max_positions=60), request(4, 14).text_tokens
    streams.open(0, SpeechRequest(text_tokens=text[:9], name="u"), jax.random.fold_in(jax.random.key(5), 0))
    tokens, status = run(streams)
    assert (len(tokens), status) == (15, "waiting")
    with pytest.raises(UserError, match=r"^u: .* at least 40 speech tokens take 62 positions, more than 60; split"):
        streams.push_text(0, np.zeros(11, np.int32))
    streams.push_text(0, text[9:])
    more, status = run(streams)
    assert (len(more), status) == (15, "waiting")
    streams.flush(0)
    rest, status = run(streams)
    (want,) = generate(params, [SpeechRequest(text_tokens=text)], stream=True, max_positions=60)
    assert (tokens + more + rest, status) == (want.speech_tokens.tolist(), want.status)


def test_speech_that_fills_the_room_before_the_text_ends_hits_the_limit(params):
    streams = make_streams(params, num_steps=9, max_positions=40)
    streams.open(0, request(4, 10, min_length=3), jax.random.key(5))
    assert [len(streams.advance()[0].speech_tokens) for _ in range(3)] == [9, 6, 9]
    with pytest.raises(UserError, match="at least 25 speech tokens take 41"):
        streams.push_text(0, np.zeros(4, np.int32))
    streams.push_text(0, np.zeros(3, np.int32))
    tokens, status = run(streams)
    assert (len(tokens), status) == (1, "hit_limit")
    streams.flush(0)
    assert streams.advance() == {}


def test_a_refused_flush_leaves_the_request_open(params):
    streams = make_streams(params)
    empty = SpeechRequest(text_tokens=np.zeros(0, np.int32), prompt_text_tokens=np.arange(3), max_length=4)
    for _ in range(2):
        streams.open(0, empty, jax.random.key(0))
        with pytest.raises(UserError, match=r"^request: has no text tokens"):
            streams.flush(0)
        assert (streams.free, run(streams)) == ([], ([], "waiting"))
        streams.close(0)
    streams.open(0, empty, jax.random.key(0))
    with pytest.raises(UserError):
        streams.flush(0)
    streams.push_text(0, np.arange(2))
    streams.flush(0)
    assert len(run(streams)[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_n": 3}, r"^u: sampling\.top_n: .* known are temperature, top_p, top_k"),
        ({"top_k": 26}, r"^u: sampling\.top_k=26: .* up to 25 candidates; ask for fewer"),
        ({"top_p": 0}, r"^u: sampling\.top_p=0\.0: must be above 0"),
    ],
)
def test_options_of_a_request_are_checked_before_it_takes_a_slot(params, options, message):
    asked = SpeechRequest(text_tokens=np.arange(3), options=options, name="u", max_length=2)
    streams = make_streams(params)
    with pytest.raises(UserError, match=message):
        streams.open(0, asked, jax.random.key(0))
    assert streams.free == [0]
    with pytest.raises(UserError, match=message):
        generate(params, [REQUESTS[0], asked])
    with pytest.raises(UserError, match=message.replace("u: ", "")):
        make_streams(params, options=options)
    streams.open(0, dataclasses.replace(asked, options={"temperature": 0}), jax.random.key(0), flushed=True)
    assert len(run(streams)[0]) == 2


@pytest.mark.parametrize("arriving", [False, True])
def test_a_dispatch_stops_where_someone_waits_and_draws_the_same(params, wanted, arriving):
    streams, tokens, sizes = make_streams(params, num_steps=25, arriving=arriving, num_slots=2), [], []
    for i in (0, 1):
        streams.open(i, REQUESTS[i], jax.random.fold_in(jax.random.key(5), i), flushed=True)
    for limit in (1, 6, 11, None, 3) * 9:
        if result := streams.advance(limit).get(0):
            sizes.append(len(result.speech_tokens))
            tokens.extend(result.speech_tokens)
    assert sizes[:2] == [1, 6]
    assert max(sizes) <= 25
    np.testing.assert_array_equal(tokens, wanted[arriving][0].speech_tokens)


def test_a_stage_speaks_of_statuses_as_the_model_does():
    assert STATUS_NAMES == decode.STATUS_NAMES


def test_nothing_to_do(params):
    assert generate(params, []) == []


@pytest.mark.parametrize(
    ("rest", "sizes"),
    [
        (1, [8]),
        (9, [8, 8]),
        (16, [8, 8]),
        (17, [32]),
        (40, [32, 8]),
        (149, [128, 32]),
        (257, [512]),
        (1200, [512, 512, 128, 32, 8, 8]),
    ],
)
def test_prompts_are_fed_in_chunks_that_are_never_half_empty(rest: int, sizes: list[int]) -> None:
    found = []
    while rest > 0:
        found.append(speech_stream.chunk_size((8, 32, 128, 512), rest))
        rest -= found[-1]
    assert found == sizes
