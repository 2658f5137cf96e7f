"""Decoder block against numpy; teacher forcing, label smoothing and CTC against their definitions."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer import asr
from tests.nn.test_layers import numpy_gelu


def test_teacher_forcing_shifts_and_masks():
    text = jnp.array([[5, 6, 9], [7, 9, 9], [9, 9, 9]])
    inputs, targets, mask = asr.teacher_forcing(text, jnp.array([3, 1, 0]))
    np.testing.assert_array_equal(inputs, [[1, 5, 6, 9], [1, 7, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(targets[:2], [[5, 6, 9, 2], [7, 2, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_formula(smoothing):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.where(np.eye(5)[targets] == 1, 1 - smoothing, smoothing / 4)
    got = asr.smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    np.testing.assert_allclose(got, -(wanted * log_probs).sum(-1), rtol=1e-5)


def brute_force_ctc(logits, text):
    """-log of the sum over all paths that collapse to the text."""
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        collapsed = [token for token, _ in itertools.groupby(path) if token != 0]
        if collapsed == list(text):
            total += np.exp(sum(log_probs[i, token] for i, token in enumerate(path)))
    return -np.log(total)


def test_ctc_loss_equals_brute_force():
    logits = np.random.default_rng(1).normal(size=(4, 5, 3)).astype(np.float32)
    texts, num_text, num_speech = [[1, 2, 2], [1, 1, 9], [2, 9, 9], [9, 9, 9]], [3, 2, 1, 0], [5, 3, 4, 5]
    got = asr.ctc_loss(*(jnp.asarray(a) for a in (logits, num_speech, texts, num_text)))
    for row in range(3):
        want = brute_force_ctc(logits[row, : num_speech[row]], texts[row][: num_text[row]])
        assert float(got[row]) == pytest.approx(want, rel=1e-4)
    assert float(got[3]) == 0.0


def test_ctc_feasibility_counts_repeats_of_valid_tokens_only():
    text = jnp.array([[1, 1, 2], [1, 1, 2], [1, 2, 2], [1, 2, 2], [1, 1, 1]])
    feasible = asr.ctc_feasible(jnp.array([4, 3, 2, 1, 9]), text, jnp.array([3, 3, 2, 2, 0]))
    np.testing.assert_array_equal(feasible, [True, False, True, False, False])


def test_infeasible_rows_have_no_loss_and_no_gradient():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.float32)
    arguments = jnp.array([2, 3]), jnp.array([[1, 1, 2], [1, 2, 3]]), jnp.array([3, 3])
    loss, grad = jax.value_and_grad(lambda x: jnp.sum(asr.ctc_loss(x, *arguments)))(logits)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(grad[0], 0)
    assert np.abs(grad[1]).max() > 0


def test_ctc_greedy_collapses_like_groupby():
    rng = np.random.default_rng(3)
    best, lengths = rng.integers(0, 3, (6, 9)), np.array([9, 9, 5, 1, 0, 7])
    tokens, num_tokens = asr.ctc_greedy(jax.nn.one_hot(best, 3), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        want = [int(token) for token, _ in itertools.groupby(best[row, :length]) if token != 0]
        assert tokens[row].tolist() == want + [0] * (9 - len(want))
        assert int(num_tokens[row]) == len(want)


def numpy_attention(q, k, v, mask):
    logits = np.where(mask, np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshc->bthc", weights / weights.sum(-1, keepdims=True), v)


def test_decoder_block_equals_numpy():
    rng = np.random.default_rng(4)
    x, memory = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 8), (2, 5, 8)))
    mask, block = jnp.array([[True] * 5, [True] * 2 + [False] * 3]), asr.DecoderBlock(8, 2, 2)
    arguments = (x, None, True, memory, mask, jnp.int32(0))
    params = nn.unbox(block.init(jax.random.key(0), *arguments))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, jnp.float32), params)
    w = jax.tree.map(np.asarray, params["params"])

    def norm(name, a):
        centred = a - a.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[name]["scale"] + w[name]["bias"]

    def heads(name, a):
        return np.einsum("bld,dhc->blhc", a, w[name]["kernel"]) + w[name].get("bias", 0)

    def merge(name, a):
        return np.einsum("blhc,hcd->bld", a, w[name]["kernel"]) + w[name]["bias"]

    y, memory = np.asarray(x), np.asarray(memory)
    h = norm("self_norm", y)
    parts = (heads(name, h) for name in ("self_query", "self_key", "self_value"))
    y = y + merge("self_out", numpy_attention(*parts, np.tril(np.ones((4, 4), bool))))
    q = heads("cross_query", norm("cross_norm", y))
    k, v = heads("cross_key", memory), heads("cross_value", memory)
    y = y + merge("cross_out", numpy_attention(q, k, v, np.asarray(mask)[:, None, None]))
    up, down = w["mlp"]["up"], w["mlp"]["down"]
    y = y + numpy_gelu(norm("mlp_norm", y) @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(block.apply(params, *arguments)[0], y, atol=2e-5)
    assert "bias" not in w["self_key"]
