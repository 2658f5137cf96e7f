"""The loss of the language model: official values, smoothing and metrics against plain numpy, chunks, memory, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig
from cv2jax.models.text_speech_lm.loss import chunked_next_token_loss, next_token_loss
from cv2jax.models.text_speech_lm.sequence import IGNORE
from cv2jax.parallel.mesh import make_mesh
from tests.models.golden_lm import GOLDENS, NUM_SPEECH_TOKENS

SPEECH, VOCABULARY, WIDTH = 27, 30, 6  # three digits of base 3, three stops


def example(seed=0, rows=3, length=11, ignored=0.3):
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(rows, length, VOCABULARY)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    targets[:, -1] = SPEECH  # eos
    # Half of the targets are likely: else every accuracy is near 0.
    likely = random.random((rows, length)) < 0.5
    logits[likely, targets[likely]] += 6
    targets[random.random((rows, length)) < ignored] = IGNORE
    return logits, targets


def head(seed=1, rows=3, length=11):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(rows, length, WIDTH), draw(WIDTH, VOCABULARY), draw(VOCABULARY)


@functools.partial(jax.jit, static_argnames=("label_smoothing", "z_loss"))
def loss_of(logits, targets, **options):
    return next_token_loss(jnp.asarray(logits), jnp.asarray(targets), num_speech_tokens=SPEECH, **options)


@pytest.mark.parametrize("name", ["uni", "bi", "mix"])
def test_official_logits_give_the_official_loss_and_accuracy(name):
    golden = np.load(GOLDENS / f"llm_{name}_tiny.npz")
    loss, metrics = next_token_loss(
        jnp.asarray(golden["logits"]),
        jnp.asarray(golden["lm_target"], jnp.int32),
        num_speech_tokens=NUM_SPEECH_TOKENS,
    )
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-6)
    assert float(metrics["nll"]) == pytest.approx(float(golden["loss"]), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(float(golden["acc"]), abs=1e-6)


def reference(logits, targets, smoothing=0.0, z=0.0):
    """The definitions, in float64 and position by position."""
    total, digits, top, seen = 0.0, [], [], {"eos": [], "speech": [], "all": []}
    places = np.argwhere(targets != IGNORE)
    for row, at in places:
        x, target = logits[row, at].astype(np.float64), targets[row, at]
        partition = np.log(np.exp(x).sum())
        p, q = np.exp(x - partition), np.full(VOCABULARY, smoothing / (VOCABULARY - 1))
        q[target] = 1 - smoothing
        total += sum(q[j] * (np.log(q[j]) - np.log(p[j])) for j in range(VOCABULARY) if q[j] > 0) + z * partition**2
        order = np.argsort(-x, kind="stable").tolist()
        top.append(order.index(target))
        if max(target, order[0]) < SPEECH:
            digits.append([target // 3**j % 3 == order[0] // 3**j % 3 for j in range(3)])
        seen["all"].append(p[SPEECH])
        if target <= SPEECH:
            seen["eos" if target == SPEECH else "speech"].append(p[SPEECH])
    top, digits = np.array(top), np.mean(digits, axis=0)
    return {
        "loss": total / len(places),
        "accuracy": np.mean(top == 0),
        "top10_accuracy": np.mean(top < 10),
        "digit_accuracy": digits.mean(),
        **{f"digit_accuracy_{j}": digits[j] for j in range(3)},
        "eos_probability_at_eos": np.mean(seen["eos"]),
        "eos_probability_at_speech": np.mean(seen["speech"]),
        "expected_eos": np.sum(seen["all"]),
        "num_eos": len(seen["eos"]),
        "num_targets": len(places),
    }


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.3, 1e-2)])
def test_loss_and_metrics_are_what_their_definitions_say(smoothing, z):
    logits, targets = example(seed=int(100 * smoothing))
    loss, metrics = loss_of(logits, targets, label_smoothing=smoothing, z_loss=z)
    want = reference(logits, targets, smoothing, z)
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want, rel=1e-5)
    assert 0.1 < want["accuracy"] < want["top10_accuracy"] < 1
    assert float(loss) == float(metrics["loss"])
    assert float(metrics["nll"]) == pytest.approx(reference(logits, targets)["loss"], rel=1e-5)


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.2, 1e-3)])
def test_the_gradient_is_that_of_plain_softmax(smoothing, z):
    logits, targets = example(seed=4)

    def plain(logits):
        log_probs = jax.nn.log_softmax(logits)
        goal = jnp.where(jax.nn.one_hot(targets, VOCABULARY) > 0, 1 - smoothing, smoothing / (VOCABULARY - 1))
        rows = -jnp.sum(goal * log_probs, -1) + z * jax.nn.logsumexp(logits, axis=-1) ** 2
        counts = targets != IGNORE
        return jnp.sum(rows * counts) / counts.sum()

    got = jax.grad(lambda x: loss_of(x, targets, label_smoothing=smoothing, z_loss=z)[0])(logits)
    np.testing.assert_allclose(got, jax.grad(plain)(logits), atol=1e-7)
    assert not np.asarray(got)[targets == IGNORE].any()


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunks_change_neither_value_nor_gradient(chunk):
    targets = jnp.asarray(example(seed=7)[1])
    hidden, kernel, bias = head()
    options = {"num_speech_tokens": SPEECH, "label_smoothing": 0.1, "z_loss": 1e-3}

    def whole(hidden, kernel, bias):
        return next_token_loss(hidden @ kernel + bias, targets, **options)

    def chunked(hidden, kernel, bias):
        return chunked_next_token_loss(hidden, kernel, bias, targets, chunk=chunk, **options)

    (_, want), want_gradients = jax.jit(jax.value_and_grad(whole, (0, 1, 2), has_aux=True))(hidden, kernel, bias)
    (_, got), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1, 2), has_aux=True))(hidden, kernel, bias)
    assert got.keys() == want.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, want_gradients)


def test_kernel_gradients_of_chunks_add_up_in_float32():
    targets = jnp.asarray(example(rows=2, length=64, ignored=0)[1])
    hidden, kernel, bias = head(rows=2, length=64)

    def loss(kernel, chunk):
        call = (hidden.astype(jnp.bfloat16), kernel, bias, targets)
        return chunked_next_token_loss(*call, num_speech_tokens=SPEECH, chunk=chunk)[0]

    one, many = jax.grad(loss)(kernel, 64), jax.grad(loss)(kernel, 1)
    assert many.dtype == jnp.float32
    # bf16 sums of 64 terms would be off by several parts in a thousand of the largest.
    assert float(jnp.abs(one - many).max()) < 5e-3 * float(jnp.abs(one).max())


def test_rows_packed_into_one_give_the_same():
    logits, targets = example(seed=3)
    want, got = loss_of(logits, targets), loss_of(logits.reshape(1, -1, VOCABULARY), targets.reshape(1, -1))
    for name in set(want[1]) - {"row_finite"}:
        assert float(got[1][name]) == pytest.approx(float(want[1][name]), rel=1e-6), name


def test_padding_and_garbage_in_it_change_nothing():
    logits, targets = example(seed=5)
    want, gradient = jax.value_and_grad(lambda x: loss_of(x, targets)[0])(logits)
    dirty = np.where(targets[..., None] == IGNORE, np.nan, logits)
    got, dirty_gradient = jax.value_and_grad(lambda x: loss_of(x, targets)[0])(dirty)
    assert float(got) == float(want)
    np.testing.assert_array_equal(dirty_gradient, gradient)


def test_a_row_that_is_not_finite_is_named():
    logits, targets = example(ignored=0)
    logits[1, 4, 2] = np.nan
    loss, metrics = loss_of(logits, targets)
    assert metrics["row_finite"].tolist() == [True, False, True]
    assert not np.isfinite(float(loss))
    logits[:, 4] = np.nan
    assert float(loss_of(logits, targets)[1]["accuracy"]) <= 10 / 11
    assert float(loss_of(logits, targets)[1]["top10_accuracy"]) <= 10 / 11


def test_without_a_target_all_is_zero_and_finite():
    loss, metrics = loss_of(jnp.full((2, 3, VOCABULARY), 1e4), jnp.full((2, 3), IGNORE))
    assert float(loss) == 0.0
    assert {float(v) for name, v in metrics.items() if name != "row_finite"} == {0.0}


def test_a_vocabulary_that_is_no_power_of_three_reports_no_digits():
    logits, targets = map(jnp.asarray, example())
    names = {
        n: [name for name in next_token_loss(logits, targets, num_speech_tokens=n)[1] if "digit" in name]
        for n in (26, 27)
    }
    assert names[26] == []
    assert sorted(names[27]) == ["digit_accuracy", *(f"digit_accuracy_{j}" for j in range(3)), "num_digits"]


def scratch(function, *arguments):
    """Bytes that value and gradient need beside arguments and results."""
    lowered = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(arguments) - 1)))).lower(*arguments)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_the_gradient_needs_nothing_beside_logits_and_itself_and_chunks_far_less():
    rows, length, width, size = 2, 512, 16, 513
    whole = rows * length * size * 4
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    logits, hidden, kernel, bias = (
        jax.ShapeDtypeStruct(s, jnp.float32)
        for s in ((rows, length, size), (rows, length, width), (width, size), (size,))
    )

    def plain(logits, targets):
        return next_token_loss(logits, targets, num_speech_tokens=510)[0]

    def chunked(hidden, kernel, bias, targets):
        return chunked_next_token_loss(hidden, kernel, bias, targets, num_speech_tokens=510, chunk=32)[0]

    assert scratch(plain, logits, targets) < 0.1 * whole
    assert (
        scratch(lambda x, t: jnp.take_along_axis(jax.nn.log_softmax(x), t[..., None], -1).sum(), logits, targets)
        > 0.9 * whole
    )
    assert scratch(chunked, hidden, kernel, bias, targets) < 0.4 * whole


def test_a_mesh_that_splits_the_vocabulary_gives_the_same():
    logits, targets = example(rows=4)
    want, _ = loss_of(logits, targets)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(logits, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor")))
    got, gradient = jax.jit(jax.value_and_grad(lambda x: loss_of(x, targets)[0]))(placed)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: loss_of(x, targets)[0])(logits), atol=1e-7)
