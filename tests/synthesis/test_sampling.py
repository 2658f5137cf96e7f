"""Samplers against the official candidates and exact distributions; independence of batch mates, masks, options."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.synthesis import sampling
from cv2jax.synthesis.sampling import NO_TOKEN, SamplingOptions

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NUM_DRAWS = 20_000
PROBS = np.array([0.30, 0.04, 0.25, 0.06, 0.20, 0.15])  # sorted: 0 2 4 5 3 1
LOGP = jnp.log(jnp.asarray(PROBS, jnp.float32))
NUCLEUS = np.array([0.30, 0, 0.25, 0, 0.20, 0.15]) / 0.9  # top_p 0.8: 5 crosses it


def keys(count=NUM_DRAWS, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def check_frequencies(sampler, probs):
    """Draws with NUM_DRAWS keys and compares each token's share with its probability, within 4.5 standard errors."""
    counts = np.bincount(np.asarray(jax.jit(jax.vmap(sampler))(keys())), minlength=len(probs))
    probs = np.asarray(probs, np.float64)
    assert np.all(counts[probs == 0] == 0)
    assert np.all(np.abs(counts / NUM_DRAWS - probs) <= 4.5 * np.sqrt(probs * (1 - probs) / NUM_DRAWS)), counts


def ras_distribution(probs, nucleus, recent, min_repeats=1):
    """The exact distribution of repetition-aware sampling: a repeated token's share goes to all others by their own."""
    result = np.zeros(len(probs))
    for token, share in enumerate(nucleus):
        if list(recent).count(token) < min_repeats:
            result[token] += share
        else:
            rest = np.where(np.arange(len(probs)) == token, 0, probs)
            result += share * rest / rest.sum()
    return result


def random_rows(count, size=64, seed=0):
    return jax.nn.log_softmax(jnp.asarray(np.random.default_rng(seed).normal(size=(count, size)) * 3, jnp.float32))


def test_candidates_are_the_official_ones():
    golden = np.load(GOLDENS / "ras_tiny.npz")
    logp = jnp.asarray(golden["logp"])
    ids, probs = sampling.nucleus_candidates(logp, 0.8, 25)
    np.testing.assert_array_equal(ids, golden["candidates"])
    wanted = np.take_along_axis(np.asarray(jax.nn.softmax(logp)), np.maximum(golden["candidates"], 0), axis=1)
    np.testing.assert_allclose(probs, np.where(golden["candidates"] < 0, 0, wanted), rtol=1e-6)
    one_by_one = jax.vmap(lambda row: sampling.nucleus_candidates(row, 0.8, 25))(logp)
    np.testing.assert_array_equal(one_by_one[0], ids)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 25), (0.3, 5), (0.999, 64), (1.0, 7), (1e-6, 3), (0.9, 1)])
def test_candidates_equal_the_official_walk(top_p, top_k):
    logp = random_rows(20)
    ids, probs = sampling.nucleus_candidates(logp, top_p, top_k)
    for row in range(20):
        p, taken, total = np.asarray(jax.nn.softmax(logp[row])), [], 0.0
        for token in np.argsort(-p, kind="stable"):
            if not (total < top_p and len(taken) < top_k):
                break
            total += p[token]
            taken.append(token)
        assert ids[row].tolist() == taken + [NO_TOKEN] * (top_k - len(taken))
        np.testing.assert_allclose(probs[row, : len(taken)], p[taken], rtol=1e-6)
        assert not np.any(probs[row, len(taken) :])


def test_equal_probabilities_keep_their_order():
    ids, _ = sampling.nucleus_candidates(jnp.zeros(6564), 1.0, 25)
    assert ids.tolist() == list(range(25))
    coarse = jnp.asarray(np.random.default_rng(0).integers(0, 4, 500), jnp.float32)
    ids, _ = sampling.nucleus_candidates(coarse, 1.0, 0)
    np.testing.assert_array_equal(ids, np.argsort(-np.asarray(coarse), kind="stable"))


def test_top_p_one_is_no_bound_even_where_the_sum_rounds_to_one():
    ids, probs = sampling.nucleus_candidates(jnp.array([-20.0, 0.0, -20.0]), 1.0, 0)
    assert ids.tolist() == [1, 0, 2]
    assert float(probs[0]) == 1.0


def test_traced_bounds_give_the_same_candidates():
    logp = random_rows(4)
    top_p, top_k = jnp.array([0.8, 0.5, 1.0, 1.0]), jnp.array([25, 3, 10, 0])
    batched = jax.jit(jax.vmap(lambda *row: sampling.nucleus_candidates(*row, num_candidates=40)))
    ids, _ = batched(logp, top_p, top_k)
    assert ids.shape == (4, 40)
    for row in range(4):
        wanted, _ = sampling.nucleus_candidates(logp[row], float(top_p[row]), int(top_k[row]) or 40)
        np.testing.assert_array_equal(ids[row, : len(wanted)], wanted)
        assert np.all(ids[row, len(wanted) :] == NO_TOKEN)


def test_traced_top_k_needs_a_shape():
    with pytest.raises(ValueError, match="num_candidates must be given"):
        jax.vmap(lambda k: sampling.nucleus_candidates(LOGP, 0.8, k))(jnp.array([3, 4]))


def test_samples_follow_the_whole_distribution():
    check_frequencies(lambda key: sampling.sample(key, LOGP), PROBS)


def test_samples_follow_the_nucleus():
    check_frequencies(lambda key: sampling.sample(key, LOGP, top_p=0.8), NUCLEUS)
    check_frequencies(lambda key: sampling.sample(key, LOGP, top_k=2), np.array([0.30, 0, 0.25, 0, 0, 0]) / 0.55)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_follow_the_temperature(temperature):
    wanted = PROBS ** (1 / temperature)
    check_frequencies(lambda key: sampling.sample(key, LOGP, temperature=temperature), wanted / wanted.sum())


@pytest.mark.parametrize("recent", [[-1, -1, -1], [1, 3, 3], [-1, 0, 1], [0, 2, 4], [0, 0, 0]])
def test_ras_follows_its_exact_distribution(recent):
    window = jnp.asarray([NO_TOKEN] * 7 + recent)
    check_frequencies(lambda key: sampling.sample_ras(key, LOGP, window), ras_distribution(PROBS, NUCLEUS, recent))


def test_ras_counts_as_often_as_the_window_says():
    window = jnp.asarray([0, 0, 0, 2, 2, 2, 2, 5, 5, NO_TOKEN])
    wanted = ras_distribution(PROBS, NUCLEUS, window.tolist(), min_repeats=3)
    for tau_r in (0.3, 0.25):  # bounds 3.0 and 2.5: three times is often enough for both, twice is not
        check_frequencies(lambda key, t=tau_r: sampling.sample_ras(key, LOGP, window, tau_r=t), wanted)


def test_ras_keeps_what_is_forbidden_out_of_the_second_draw():
    forbidden = jnp.arange(6) == 2
    probs = np.where(forbidden, 0, PROBS) / 0.75
    nucleus = np.array([0.30, 0, 0, 0, 0.20, 0.15]) / 0.65
    wanted = ras_distribution(probs, nucleus, [0])
    check_frequencies(lambda key: sampling.sample_ras(key, LOGP, jnp.asarray([0] * 10), forbidden), wanted)


def test_ras_repeats_where_nothing_else_is_allowed():
    token = sampling.sample_ras(jax.random.key(0), LOGP, jnp.full(10, 3), jnp.arange(6) != 3)
    assert int(token) == 3


def test_ras_draws_anew_from_a_one_hot_distribution():
    logp = jnp.asarray([0.0, -200.0, -200.0, -200.0])  # the others' probabilities underflow; their logs do not
    tokens = jax.vmap(lambda key: sampling.sample_ras(key, logp, jnp.zeros(10, jnp.int32)))(keys(200))
    assert set(tokens.tolist()) == {1, 2, 3}


def test_temperature_zero_is_greedy():
    rows, window = random_rows(30), jnp.arange(64)  # every token is in the window, and greedy may repeat
    wanted = jnp.argmax(rows, axis=-1)
    for row, key in enumerate(keys(30)):
        assert int(sampling.greedy(rows[row])) == int(wanted[row])
        assert int(sampling.sample(key, rows[row], temperature=0.0)) == int(wanted[row])
        assert int(sampling.sample_ras(key, rows[row], window, temperature=0.0)) == int(wanted[row])
    forbidden = jnp.arange(64) == wanted[0]
    second = int(jnp.argsort(-rows[0])[1])
    assert int(sampling.greedy(rows[0], forbidden)) == second
    assert int(sampling.sample(keys(1)[0], rows[0], forbidden, temperature=0.0)) == second


def test_one_row_draws_the_same_alone_jitted_and_among_others():
    rows, all_keys = random_rows(32, size=6564), keys(32)
    recent = jnp.asarray(np.random.default_rng(1).integers(0, 6564, (32, 10)), jnp.int32)
    recent = recent.at[::2, 0].set(jnp.argmax(rows[::2], axis=-1).astype(jnp.int32))  # some do repeat
    alone = [int(sampling.sample_ras(key, row, r)) for key, row, r in zip(all_keys, rows, recent, strict=True)]
    jitted = jax.jit(sampling.sample_ras)
    assert [int(jitted(*row)) for row in zip(all_keys, rows, recent, strict=True)] == alone
    batched = jax.jit(jax.vmap(sampling.sample_ras))
    assert batched(all_keys, rows, recent).tolist() == alone
    assert len(set(alone)) > 16


def test_batch_mates_and_places_do_not_change_a_draw():
    rows, all_keys, recent = random_rows(8), keys(8), jnp.full((8, 10), NO_TOKEN)
    batched = jax.jit(jax.vmap(sampling.sample_ras))
    first = batched(all_keys, rows, recent)
    mates = random_rows(8, seed=9).at[3].set(rows[3])
    other = batched(keys(8, seed=5).at[3].set(all_keys[3]), mates, recent.at[0].set(7))
    assert int(other[3]) == int(first[3])
    order = jnp.array([5, 3, 0, 7, 1, 2, 6, 4])
    np.testing.assert_array_equal(batched(all_keys[order], rows[order], recent), first[order])


def test_the_static_bound_on_candidates_does_not_change_a_draw():
    rows, all_keys = random_rows(200), keys(200)

    def draw(num_candidates):
        return jax.vmap(lambda k, row: sampling.sample(k, row, top_p=0.8, top_k=9, num_candidates=num_candidates))

    np.testing.assert_array_equal(draw(9)(all_keys, rows), draw(50)(all_keys, rows))


def test_options_may_differ_in_a_batch():
    rows, all_keys, recent = random_rows(3), keys(3), jnp.full((3, 10), NO_TOKEN)
    temperature, top_p, top_k = jnp.array([1.0, 0.0, 0.7]), jnp.array([0.8, 0.5, 1.0]), jnp.array([25, 2, 9])

    def step(key, logp, window, t, p, k):
        return sampling.sample_ras(key, logp, window, temperature=t, top_p=p, top_k=k, num_candidates=25)

    mixed = jax.jit(jax.vmap(step))(all_keys, rows, recent, temperature, top_p, top_k)
    for row in range(3):
        options = {"temperature": float(temperature[row]), "top_p": float(top_p[row]), "top_k": int(top_k[row])}
        assert int(mixed[row]) == int(sampling.sample_ras(all_keys[row], rows[row], recent[row], **options))


def test_what_is_forbidden_is_not_drawn_where_nothing_else_has_mass():
    stops = jnp.array([61, 62, 63])
    logp, before = jnp.full(64, -20.0).at[stops].set(jnp.log(0.3333)), jnp.arange(64) >= 61
    # Speech has next to no mass, yet nothing else may be drawn, not even by the second draw of RAS.
    window = jnp.arange(10)
    for forbidden, allowed in ((before, False), (~before, True)):
        tokens = jax.vmap(lambda key, f=forbidden: sampling.sample_ras(key, logp, window, f))(keys(500))
        assert np.all(np.isin(np.asarray(tokens), stops) == allowed)
        assert (int(sampling.greedy(logp, forbidden)) in stops) == allowed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("win_size", -1),
        ("tau_r", 0.0),
        ("tau_r", float("nan")),
    ],
)
def test_options_that_cannot_be_meant(name, value):
    options = SamplingOptions(**{name: value})
    with pytest.raises(UserError, match=rf"^sampling\.{name}="):
        options.validate()
    with pytest.raises(UserError, match=rf"^sampling\.{name}="):
        sampling.make_request_sampler(options)


@pytest.mark.parametrize("shared", [{}, {"win_size": 0}, {"win_size": 4, "tau_r": 0.5}])
def test_a_request_sampler_draws_with_the_options_of_each_request(shared):
    rows, all_keys = random_rows(3), keys(3)
    recent = jnp.full((3, shared.get("win_size", 10)), NO_TOKEN).at[:, -2:].set(jnp.argmax(rows, axis=-1)[:, None])
    varied = {}, {"temperature": 0.0, "top_k": 2}, {"top_p": 0.5, "temperature": 2.0}
    asked = [SamplingOptions(**shared, **one) for one in varied]
    sampler, forbidden = sampling.make_request_sampler(asked[0]), jnp.zeros((3, 64), bool).at[:, 7].set(True)
    table = [sampler.options(options) for options in asked]
    columns = {name: jnp.array([row[name] for row in table]) for name in table[0]}
    drawn = jax.jit(jax.vmap(sampler))(all_keys, rows, recent, forbidden, columns)
    for row, options in enumerate(asked):
        wanted = dataclasses.asdict(options)
        del wanted["win_size"]
        alone = sampling.sample_ras(all_keys[row], rows[row], recent[row], forbidden[row], **wanted)
        assert int(drawn[row]) == int(alone)
    again = sampling.make_request_sampler(SamplingOptions(temperature=0.5, **shared))
    assert (again, hash(again)) == (sampler, hash(sampler))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 26}, r"^sampling\.top_k=26: the decoder was built for up to 25 candidates"),
        ({"win_size": 4}, r"^sampling\.win_size=4: the decoder was built for 10"),
        ({"tau_r": 0.2}, r"^sampling\.tau_r=0\.2: the decoder was built for 0\.1"),
        ({"top_p": 0.0}, r"^sampling\.top_p=0\.0: must be above 0"),
    ],
)
def test_a_request_sampler_refuses_what_it_was_not_built_for(options, message):
    with pytest.raises(UserError, match=message) as error:
        sampling.RequestSampler().options(SamplingOptions(**options))
    assert "\n" not in str(error.value)


def test_a_row_is_completed_typed_and_checked():
    sampler = sampling.RequestSampler(win_size=4, tau_r=0.3, num_candidates=30)
    assert sampler.row({}) == sampler.row(sampler.row({})) == {"temperature": 1.0, "top_p": 0.8, "top_k": 25}
    row = sampler.row({"top_p": 1, "top_k": np.int64(30), "temperature": np.float32(0.5)})
    assert row == {"temperature": 0.5, "top_p": 1.0, "top_k": 30}
    assert [type(value) for value in row.values()] == [float, float, int]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 26}, r"^sampling\.top_k=26: the decoder was built"),
        ({"top_k": 2.5}, r"^sampling\.top_k=2\.5: must be a whole number"),
        ({"top_p": "0.8"}, r"^sampling\.top_p='0\.8': must be a number"),
        ({"top_p": 0}, r"^sampling\.top_p=0\.0: must be above 0"),
        ({"win_size": 10}, r"^sampling\.win_size: is no option of a request; known are temperature, top_p, top_k$"),
    ],
)
def test_a_row_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        sampling.RequestSampler().row(options)


def test_a_request_sampler_without_a_bound_on_candidates_takes_every_token():
    with pytest.raises(ValueError, match="give num_candidates"):
        sampling.make_request_sampler(SamplingOptions(top_k=0))
    sampler = sampling.make_request_sampler(SamplingOptions(top_k=0), num_candidates=64)
    assert sampler.options(SamplingOptions(top_k=0))["top_k"] == 0
