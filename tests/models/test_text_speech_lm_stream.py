"""Whole and arriving text: the sequence of inputs against the training layout, tokens against a teacher-forced forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.models.text_speech_lm import decode, sequence, stream
from cv2jax.models.text_speech_lm.model import TextSpeechLm, init_params
from cv2jax.nn.masks import causal_mask
from cv2jax.nn.stack import stack_layers
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.synthesis.sampling import RequestSampler, SamplingOptions
from tests.models.golden_lm import golden_config, golden_params

CONFIG, SAMPLER = golden_config(), RequestSampler()
EOS = sequence.eos_id(CONFIG.num_speech_tokens)
RATIOS = [(5, 15), (1, 1), (3, 7), (4, 2), None]


@pytest.fixture(scope="module")
def params():
    """Random weights of some spread: those of the golden model repeat one token greedily."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.15 * rng.normal(size=a.shape), jnp.float32), golden_params(CONFIG))


def cut(tokens, rng):
    """Random pieces, some of them empty."""
    borders = np.sort(rng.integers(0, len(tokens) + 1, rng.integers(0, 8)))
    return np.split(np.asarray(tokens, np.int32), borders)


def play(prompt_text, prompt_speech, pieces, speech, ratio, rng):
    """Runs the machine, "drawing" `speech`; returns the inputs (token, kind) and what was drawn behind each."""
    progress, inputs, drawn, left = (
        stream.init(prompt_text.tolist(), prompt_speech.tolist(), ratio),
        [],
        [],
        speech.tolist(),
    )

    def run():
        nonlocal progress
        num = 0
        while True:
            progress, todo = stream.step(progress, num)
            inputs.extend(zip(todo.tokens, todo.kinds, strict=True))
            num = min(todo.num_draws, int(rng.integers(1, 9)), len(left))
            if not todo.num_draws or (todo.in_tail and not left):
                return todo
            assert num, "a group asked for more speech than there is"
            for _ in range(num):
                drawn.append((len(inputs) - 1, left[0]))
                inputs.append((left.pop(0), sequence.SPEECH))

    for piece in pieces:
        progress = stream.push_text(progress, piece.tolist())
        assert not run().in_tail
    progress = stream.flush(progress)
    assert run().in_tail
    return inputs, drawn


@pytest.mark.parametrize("ratio", RATIOS)
def test_inputs_and_draws_are_those_of_the_training_layout(ratio):
    rng = np.random.default_rng(3)
    for _ in range(60):
        text, num_prompt_text = rng.integers(0, 512, rng.integers(1, 40)), int(rng.integers(0, 12))
        num_text = num_prompt_text + len(text)
        groups = num_text // ratio[0] * ratio[1] if ratio else 0
        speech = rng.integers(0, 61, groups + int(rng.integers(0, 20)))
        num_prompt = int(rng.integers(0, min(len(speech), 50) + 1))
        prompt_text = rng.integers(0, 512, num_prompt_text)
        row = sequence.build_row(
            np.concatenate([prompt_text, text]),
            speech,
            bistream=ratio is not None,
            text_vocabulary_size=512,
            num_speech_tokens=61,
            ratio=ratio or (5, 15),
        )
        for _ in range(3):
            arguments = prompt_text, speech[:num_prompt], cut(text, rng), speech[num_prompt:], ratio, rng
            inputs, drawn = play(*arguments)
            assert inputs == list(zip(row.token.tolist(), row.kind.tolist(), strict=True))
            at, tokens = (np.array([pair[i] for pair in drawn], int) for i in (0, 1))
            np.testing.assert_array_equal(row.targets[at], tokens)
            # Nothing is drawn where the layout has no target or a prompt; what is left are the fills and the one eos.
            others = np.setdiff1d(np.flatnonzero(row.targets != sequence.IGNORE), at)
            others = others[row.targets[others] >= 61]
            assert len(others) == (num_text // ratio[0] if ratio else 0) + 1


def test_a_group_filled_by_the_prompt_waits_for_text_and_has_no_double_group():
    progress = stream.init(range(6), range(15))  # Q2: a whole group of prompt speech
    progress, todo = stream.step(progress)
    assert todo.tokens == (sequence.SOS, *range(5), *range(15))
    assert (todo.num_draws, todo.in_tail) == (0, False)
    progress, todo = stream.step(stream.push_text(progress, [10, 11, 12]))
    assert (todo.tokens, todo.num_draws) == ((), 0)
    progress, todo = stream.step(stream.push_text(progress, [13, 14]))
    assert (todo.tokens, todo.num_draws) == ((5, 10, 11, 12, 13), 15)
    progress, todo = stream.step(stream.flush(progress), 4)
    assert (todo.tokens, todo.num_draws, todo.in_tail) == ((), 11, False)
    progress, todo = stream.step(progress, 11)
    assert todo.tokens == (14, sequence.TASK)  # Q1: nothing is fed twice
    assert todo.in_tail


def test_prompt_speech_that_the_text_leaves_over_goes_behind_task():
    progress = stream.flush(stream.push_text(stream.init([1], range(20)), [2, 3, 4, 5, 6]))  # Q3
    _, todo = stream.step(progress)
    assert todo.tokens == (sequence.SOS, 1, 2, 3, 4, 5, *range(15), 6, sequence.TASK, *range(15, 20))
    assert todo.in_tail


def test_misuse_of_the_machine():
    with pytest.raises(ValueError, match="behind the flush"):
        stream.push_text(stream.flush(stream.init()), [1])
    progress, todo = stream.step(stream.push_text(stream.init(), range(5)))
    assert todo.num_draws == 15
    with pytest.raises(ValueError, match="16 tokens were drawn"):
        stream.step(progress, 16)
    with pytest.raises(UserError, match="ratio 0:15"):
        stream.init(ratio=(0, 15))


def request(seed, num_text, num_prompt_text=0, num_prompt_speech=0, **settings):
    rng = np.random.default_rng(seed)
    return stream.Request(
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
    settings = {"options": DRAWS, "seed": 5, "num_steps": 4} | settings
    return stream.generate(CONFIG, params, requests, SAMPLER, **settings)


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
        streams = stream.Streams(
            CONFIG, decode.decoder_params(CONFIG, params), SAMPLER, options=DRAWS, num_slots=8, num_steps=4
        )
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
            [stream.Result(speech_tokens=np.array(d, np.int32), status=s) for d, s in zip(drawn, status, strict=True)],
            want,
        )
        assert status == [r.status for r in want]


def test_a_slot_is_as_new_for_its_next_request(params, wanted):
    streams = stream.Streams(
        CONFIG, decode.decoder_params(CONFIG, params), SAMPLER, options=DRAWS, arriving=False, num_steps=1
    )
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
        (stream.Request(text_tokens=np.array([5, 512])), r"^u: text token 512 at 1 lies outside"),
        (
            stream.Request(text_tokens=np.array([5]), prompt_speech_tokens=np.array([61])),
            r"^u: speech token 61 at 0 lies outside",
        ),
    ],
)
def test_errors(params, asked, message):
    with pytest.raises(UserError, match=message) as error:
        generate(params, [REQUESTS[0], dataclasses.replace(asked, name="u")])
    assert "\n" not in str(error.value)


def test_nothing_to_do(params):
    assert generate(params, []) == []
