"""Slots on the device: official probabilities behind forced tokens, independence of slots, growth, endings, compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.text_speech_lm import decode, sequence
from cv2jax.nn.stack import stack_layers
from cv2jax.synthesis.sampling import RequestSampler, SamplingOptions
from tests.models.golden_lm import GOLDENS, golden_config, golden_params

CONFIG, SAMPLER = golden_config(), RequestSampler()
EOS, NUM_OUTPUTS = sequence.eos_id(CONFIG.num_speech_tokens), CONFIG.num_outputs


@pytest.fixture(scope="module")
def params():
    return golden_params(CONFIG)


@pytest.fixture(scope="module")
def lively():
    """Weights that repeat themselves less than the golden ones."""
    rng = np.random.default_rng(11)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.15 * rng.normal(size=a.shape), jnp.float32), golden_params(CONFIG))


def controls(num_slots, temperature=1.0, **changes):
    options = SAMPLER.options(SamplingOptions(temperature=temperature))
    whole = {
        "key": jax.random.split(jax.random.key(3), num_slots),
        "options": {name: np.full(num_slots, value) for name, value in options.items()},
        "min_length": np.zeros(num_slots, np.int32),
        "max_length": np.full(num_slots, 1000, np.int32),
        "budget": np.full(num_slots, 1000, np.int32),
        "may_end": np.ones(num_slots, bool),
    }
    return decode.Controls(**whole | changes)


def rows(lengths, seed=0):
    """Random [sos] text [task], one row a slot, padded with garbage; a length 0 feeds nothing."""
    rng, size = np.random.default_rng(seed), 40 if max(lengths) <= 40 else 128  # few shapes to compile
    tokens, kinds = rng.integers(0, 61, (len(lengths), size)), np.full((len(lengths), size), sequence.TEXT)
    tokens[:, 0], kinds[:, 0] = sequence.SOS, sequence.SPECIAL
    for i, length in enumerate(lengths):
        if length:
            tokens[i, length - 1], kinds[i, length - 1] = sequence.TASK, sequence.SPECIAL
    return tokens.astype(np.int32), kinds.astype(np.int32), np.array(lengths, np.int32)


def start(params, fed, length=128):
    state = decode.init_state(CONFIG, len(fed[0]), length, SAMPLER.win_size)
    return decode.prefill(CONFIG, params, state, *fed)


def run(params, state, wanted, num_steps):
    """All tokens until every slot has ended, in hops of num_steps."""
    tokens, before = [[] for _ in state.status], np.asarray(state.num_generated)
    while True:
        state, drawn = decode.decode(CONFIG, SAMPLER, params, state, wanted, num_steps=num_steps)
        for i, number in enumerate(drawn.num_speech_tokens):
            tokens[i].extend(drawn.speech_tokens[i, :number].tolist())
            assert np.all(drawn.speech_tokens[i, number:] == decode.NO_TOKEN)
        if not np.any(drawn.status == decode.RUNNING):
            np.testing.assert_array_equal(state.num_generated - before, [len(t) for t in tokens])
            return tokens, [decode.STATUS_NAMES[s] for s in drawn.status]


def test_forced_tokens_give_the_official_probabilities(params):
    golden = np.load(GOLDENS / "llm_step_tiny.npz")
    text = np.concatenate([golden["prompt_text"][0], golden["text"][0]])
    prompt, forced = golden["prompt_speech_token"][0], golden["forced"]
    token = np.concatenate([[sequence.SOS], text, [sequence.TASK], prompt, forced]).astype(np.int32)
    kind = np.full(len(token), sequence.SPEECH, np.int32)
    kind[: len(text) + 2] = sequence.TEXT
    kind[[0, len(text) + 1]] = sequence.SPECIAL
    state, at, got = decode.init_state(CONFIG, 2, 128, 10), 0, []
    for size in (5, len(text) + 2 + len(prompt) - 5, *[1] * len(forced)):  # slot 1 sees the same in its second half
        tokens, kinds = np.zeros((2, 2, 40), np.int32)
        tokens[1, :size], kinds[1, :size] = token[at : at + size], kind[at : at + size]
        state = decode.prefill(CONFIG, params, state, tokens, kinds, np.array([0, size], np.int32))
        at += size
        got.append(np.asarray(jax.nn.log_softmax(state.logits[1])))
    np.testing.assert_allclose(got[1:], golden["logp"], atol=1e-4)
    assert state.num_cached.tolist() == [0, len(token)]


def test_untouched_slots_stay_bit_for_bit_and_the_end_of_a_cache_is_not_overrun(params):
    state = start(params, rows([128, 7, 127]))
    before = jax.device_get(state)
    fed = rows([0, 40, 1], seed=1)  # padding of slots 0 and 2 reaches beyond the end of their caches
    state = jax.device_get(decode.prefill(CONFIG, params, state, *fed))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    for layer, old in zip(state.cache, before.cache, strict=True):
        for name in ("k", "v"):
            np.testing.assert_array_equal(layer[name][1, :7], old[name][1, :7])
            np.testing.assert_array_equal(layer[name][2, :127], old[name][2, :127])
            assert np.all(layer[name][2, 127] != old[name][2, 127])
    assert state.num_cached.tolist() == [128, 47, 128]
    assert np.all(np.isfinite(state.logits))


def test_what_does_not_fit_ends_as_non_finite_and_a_full_cache_rests(params):
    state, wanted = start(params, rows([120, 128, 2, 2])), controls(4, may_end=np.zeros(4, bool))
    state, drawn = decode.decode(CONFIG, SAMPLER, params, state, wanted, num_steps=25)
    assert drawn.num_speech_tokens.tolist() == [8, 0, 25, 25]
    assert drawn.status.tolist() == [decode.RUNNING] * 4
    state = decode.grow(decode.prefill(CONFIG, params, state, *rows([0, 2, 0, 0])), 256)
    state, drawn = decode.decode(CONFIG, SAMPLER, params, state, wanted, num_steps=3)
    assert drawn.num_speech_tokens.tolist() == [3, 0, 3, 3]
    assert drawn.status.tolist() == [decode.RUNNING, decode.NON_FINITE, decode.RUNNING, decode.RUNNING]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_alone_with_others_elsewhere_and_in_any_hops(lively, temperature):
    lengths = [9, 31, 4, 17]
    tokens, kinds, nums = rows(lengths, seed=5)
    limits = np.array([40, 11, 23, 60], np.int32)
    whole = controls(4, temperature, max_length=limits, min_length=limits // 4)
    want, status = run(lively, start(lively, (tokens, kinds, nums)), whole, 25)
    assert len({len(t) for t in want}) > 2
    assert all(m // 4 <= len(t) <= m for t, m in zip(want, limits, strict=True))
    pick = lambda order: jax.tree.map(lambda a: a[order], whole)  # noqa: E731
    order = np.array([2, 0, 3, 1])
    fed = tokens[order], kinds[order], nums[order]
    got = run(lively, start(lively, fed), pick(order), 25)
    assert got == ([want[i] for i in order], [status[i] for i in order])
    assert run(lively, start(lively, (tokens, kinds, nums), length=256), whole, 3) == (want, status)
    for i in (0, 3):
        one = np.array([i])
        assert run(lively, start(lively, (tokens[one], kinds[one], nums[one])), pick(one), 1) == (
            [want[i]],
            [status[i]],
        )


def test_growth_and_budgets_change_no_token(lively):
    fed, ends = rows([100, 20, 3, 3]), np.full(4, 60, np.int32)
    whole = controls(4, max_length=ends, min_length=ends)
    want, _ = run(lively, start(lively, fed, 256), whole, 3)
    state, got = start(lively, fed), [[] for _ in want]
    for hop in range(2):
        budget = np.array([14, [0, 20][hop], 25, 1], np.int32)
        state, drawn = decode.decode(CONFIG, SAMPLER, lively, state, whole.replace(budget=budget), num_steps=25)
        assert drawn.num_speech_tokens.tolist() == budget.tolist()
        for i, number in enumerate(budget):
            got[i].extend(drawn.speech_tokens[i, :number].tolist())
    rest, _ = run(lively, decode.grow(state, decode.cache_length(160)), whole, 3)
    assert [a + b for a, b in zip(got, rest, strict=True)] == want
    assert [len(t) for t in want] == [60] * 4


def test_stacked_parameters_become_those_of_the_decoder_exactly(lively):
    params = decode.decoder_params(CONFIG, lively | {"backbone": stack_layers(lively["backbone"])})
    jax.tree.map(np.testing.assert_array_equal, params, lively)
    jax.tree.map(np.testing.assert_array_equal, decode.decoder_params(CONFIG, lively), lively)


def with_bias(params, **logits):
    """The model that, whatever it reads, gives these logits to these outputs and 0 to all others."""
    bias = jnp.zeros(NUM_OUTPUTS).at[jnp.array([int(k[1:]) for k in logits])].set(jnp.array(list(logits.values())))
    return params | {"head_kernel": jnp.zeros_like(params["head_kernel"]), "head_bias": bias}


def test_stops_below_the_minimum_and_outside_the_layout_are_never_drawn(params):
    stops = with_bias(params, **{f"t{EOS + i}": 60.0 for i in range(3)})  # nothing but stops has any mass
    wanted = controls(4, min_length=np.array([0, 5, 12, 0], np.int32), may_end=np.array([True, True, True, False]))
    wanted = wanted.replace(max_length=np.array([30, 30, 8, 14], np.int32))
    tokens, status = run(stops, start(stops, rows([3] * 4)), wanted, 25)
    assert [len(t) for t in tokens] == [0, 5, 8, 14]
    assert status == ["ok", "ok", "hit_limit", "hit_limit"]
    assert max(max(t, default=0) for t in tokens) < EOS


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_a_slot_without_a_token(params, value):
    state = start(params, rows([3] * 4))
    state = state.replace(logits=state.logits.at[0, 7].set(value))
    wanted = controls(4, may_end=np.zeros(4, bool), budget=np.full(4, 4, np.int32))
    state, drawn = decode.decode(CONFIG, SAMPLER, params, state, wanted, num_steps=25)
    assert drawn.num_speech_tokens.tolist() == [0, 4, 4, 4]
    assert drawn.status.tolist() == [decode.NON_FINITE] + [decode.RUNNING] * 3
    state = decode.reset(state, np.array([True, False, False, False]))
    assert (state.status.tolist(), state.num_cached.tolist()) == ([decode.RUNNING] * 4, [0, 7, 7, 7])
    assert state.recent[0].tolist() == [decode.NO_TOKEN] * 10
    assert state.recent[1, -4:].tolist() == drawn.speech_tokens[1, :4].tolist()


def test_bfloat16_casts_weights_once_but_norms_and_the_bias_of_the_head_never(params):
    backbone = {**CONFIG.backbone.__dict__, "dtype": "bfloat16"}
    config = type(CONFIG)(backbone=type(CONFIG.backbone)(**backbone), num_speech_tokens=CONFIG.num_speech_tokens)
    cast = decode.decoder_params(config, params)
    assert cast["head_bias"].dtype == cast["backbone"]["blocks_1"]["mlp_norm"]["scale"].dtype == jnp.float32
    assert cast["text_embedding"].dtype == cast["backbone"]["blocks_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    states = []
    for weights in (params, cast):
        state = decode.prefill(config, weights, decode.init_state(config, 1, 128, 10), *rows([9]))
        states.append(state.logits)
        assert state.cache[0]["k"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(*states)


def test_calls_of_one_shape_compile_once(params):
    def count():
        return [f._cache_size() for f in (decode.init_state, decode.prefill, decode.decode, decode.reset)]

    for seed in range(4):
        fresh, budget = np.arange(4) < seed, np.array([seed, 5, 9, 0], np.int32)
        state = decode.reset(start(params, rows([5, 9, 2, 1], seed)), fresh)
        state = decode.prefill(CONFIG, params, state, *rows([9, 0, 3, seed], seed))
        wanted = controls(4, budget=budget, temperature=float(seed))
        for _ in range(2):
            state, _ = decode.decode(CONFIG, RequestSampler(), params, state, wanted, num_steps=25)
        if seed == 0:
            first = count()
    assert count() == first


def test_buckets_of_the_cache():
    lengths = [1, 128, 129, 256, 257, 1000, 1025]
    assert [decode.cache_length(n) for n in lengths] == [128, 128, 256, 256, 512, 1024, 2048]
