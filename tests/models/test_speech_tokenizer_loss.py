"""The loss written out in numpy; rows that must not weigh, weigh nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.models.speech_tokenizer import asr
from cv2jax.models.speech_tokenizer.fsq import digit_balance_loss
from cv2jax.models.speech_tokenizer.loss import tokenizer_loss
from cv2jax.models.speech_tokenizer.model import SpeechTokenizerOutput
from tests.models.small_tokenizer import SMALL, make_batch

CONFIG = SMALL


@pytest.fixture
def output():
    rng = np.random.default_rng(0)
    draw = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 7, 12), (4, 16, 12), (4, 16))]
    return SpeechTokenizerOutput(
        hidden=jnp.zeros((4, 16, 16)),
        z=None,
        speech_tokens=jnp.zeros((4, 16), jnp.int32),
        num_speech_tokens=jnp.array([16, 13, 10, 16]),
        decoder_logits=draw[0],
        ctc_logits=draw[1],
        pitch=100.0 + 30.0 * draw[2],
        commitment=jnp.float32(0.5),
        model_state={},
    )


def test_every_part_and_its_weight(output):
    batch = make_batch()
    loss, metrics = tokenizer_loss(output, batch, CONFIG)
    _, targets, _ = asr.teacher_forcing(batch["text_tokens"], batch["num_text_tokens"])
    per_token = np.asarray(asr.smoothed_cross_entropy(output.decoder_logits, targets, 0.1))
    decoder = (per_token[0, :6].sum() + per_token[1, :4].sum()) / 10
    ctc = asr.ctc_loss(output.ctc_logits, output.num_speech_tokens, batch["text_tokens"], batch["num_text_tokens"])
    ctc = float(ctc[0] + ctc[1]) / 8
    error = np.abs(np.asarray(output.pitch) - np.asarray(batch["f0"])) / 100
    pitch = (error[0, :16].sum() + error[1, :13].sum() + error[2, :10].sum()) / 39
    assert float(metrics["decoder_loss"]) == pytest.approx(decoder, rel=1e-5)
    assert float(metrics["ctc_loss"]) == pytest.approx(ctc, rel=1e-5)
    assert float(metrics["pitch_loss"]) == pytest.approx(pitch, rel=1e-5)
    assert float(loss) == pytest.approx(decoder + 0.3 * ctc + 0.3 * pitch, rel=1e-5)
    assert int(metrics["num_text_tokens"]) == 10
    assert "commitment_loss" not in metrics


def test_commitment_enters_for_vq_only(output):
    batch = make_batch()
    plain, _ = tokenizer_loss(output, batch, CONFIG)
    vq, metrics = tokenizer_loss(output, batch, dataclasses.replace(CONFIG, quantizer="vq", commitment_weight=0.25))
    assert float(vq - plain) == pytest.approx(0.125, rel=1e-4)
    assert float(metrics["commitment_loss"]) == 0.5


def test_the_balance_of_the_digits_enters_by_its_weight_over_rows_that_count(output):
    batch = make_batch()
    output = output.replace(z=jax.random.normal(jax.random.key(0), (4, 16, 8)).at[3].set(jnp.nan))
    plain, without = tokenizer_loss(output, batch, CONFIG)
    loss, metrics = tokenizer_loss(output, batch, dataclasses.replace(CONFIG, balance_weight=0.1))
    mask = (jnp.arange(16) < output.num_speech_tokens[:, None]) & batch["row_mask"][:, None]
    assert float(metrics["balance_loss"]) == pytest.approx(float(digit_balance_loss(output.z, mask)), rel=1e-6)
    assert float(loss - plain) == pytest.approx(0.1 * float(metrics["balance_loss"]), rel=1e-3)
    assert "balance_loss" not in without


def test_masked_rows_may_hold_anything(output):
    """A filler row, a text-less row and padded targets: NaN there reaches neither loss nor gradient."""
    batch = make_batch()

    def loss(logits, ctc, pitch):
        return tokenizer_loss(output.replace(decoder_logits=logits, ctc_logits=ctc, pitch=pitch), batch, CONFIG)[0]

    clean = (output.decoder_logits, output.ctc_logits, output.pitch)
    want = loss(*clean)
    dirty = [a.at[3].set(1e6) for a in clean]
    dirty[0] = dirty[0].at[2].set(1e6).at[1, 4:].set(1e6)
    dirty[2] = dirty[2].at[1, 13:].set(1e6)
    got, grads = jax.value_and_grad(loss, (0, 1, 2))(*dirty)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not np.any(grad[3])


def test_row_loss_points_at_the_broken_row(output):
    batch = make_batch()
    broken = output.replace(decoder_logits=output.decoder_logits.at[1, 0].set(jnp.nan))
    loss, metrics = tokenizer_loss(broken, batch, CONFIG)
    assert not np.isfinite(loss)
    np.testing.assert_array_equal(np.isfinite(metrics["row_loss"]), [True, False, True, True])
    assert float(metrics["row_loss"][3]) == 0.0


def test_f0_mask_restricts_the_pitch_loss(output):
    batch = make_batch()
    only = jnp.zeros((4, 16), bool).at[0, 2].set(True).at[3].set(True)
    _, metrics = tokenizer_loss(output, batch | {"f0_mask": only}, CONFIG)
    want = abs(float(output.pitch[0, 2] - batch["f0"][0, 2])) / 100
    assert float(metrics["pitch_loss"]) == pytest.approx(want, rel=1e-5)


def test_a_batch_without_any_text_has_zero_loss(output):
    batch = make_batch() | {"num_text_tokens": jnp.zeros(4, jnp.int32)}
    loss, metrics = tokenizer_loss(output.replace(pitch=None), batch, SMALL)
    assert float(loss) == 0.0
    assert float(metrics["decoder_accuracy"]) == 0.0


def test_accuracy_of_perfect_logits_is_one(output):
    batch = make_batch()
    _, targets, _ = asr.teacher_forcing(batch["text_tokens"], batch["num_text_tokens"])
    perfect = output.replace(decoder_logits=20.0 * jax.nn.one_hot(targets, 12))
    assert float(tokenizer_loss(perfect, batch, SMALL)[1]["decoder_accuracy"]) == 1.0


def test_without_a_row_mask_every_row_counts(output):
    batch = make_batch()
    del batch["row_mask"]
    assert int(tokenizer_loss(output, batch, SMALL)[1]["num_text_tokens"]) == 17
