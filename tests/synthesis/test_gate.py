import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.synthesis import gate
from cv2jax.synthesis.bundle import Bundle
from cv2jax.synthesis.bundle_files import GOLDEN
from tests.synthesis import small_engine

CHECK = gate.Check(stage="flow_matching", quantity="mel", error=0.01, bound=0.05, seconds=1.0)


def test_the_error_is_relative_to_the_whole_array_and_for_whole_numbers_a_share():
    wanted = np.array([3.0, 4.0], np.float32)
    assert gate.relative_error(wanted, wanted) == 0
    assert gate.relative_error(wanted + np.array([0, 0.5], np.float32), wanted) == pytest.approx(0.1)
    assert gate.relative_error(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == 0.25
    assert gate.relative_error(np.array([3.0, np.nan]), wanted) == math.inf
    assert gate.relative_error(wanted[:1], wanted) == math.inf
    assert gate.relative_error(np.zeros(0, np.int32), np.zeros(0, np.int32)) == 0


def test_numbers_that_are_not_finite_are_counted_in_any_type():
    arrays = {
        "a": np.array([1, np.nan, 3, 4], np.float32),
        "b": np.asarray(jnp.array([1, -jnp.inf, 2.0, 0], jnp.bfloat16)),
    }
    assert gate.share_not_finite(arrays) == 0.25
    assert gate.share_not_finite({"b": arrays["b"][2:], "c": np.array([7], np.int32)}) == 0
    assert gate.share_not_finite({}) == 0


def test_the_first_that_does_not_pass_is_named():
    worse = dataclasses.replace(CHECK, stage="hift_vocoder", error=0.06)
    told = dataclasses.replace(CHECK, bound=None, error=5.0)
    broken = dataclasses.replace(told, stage="text_speech_lm", error=math.inf)
    assert gate.first_drift([CHECK, told]) is None
    assert gate.first_drift([CHECK, worse, broken]) is worse
    assert gate.first_drift([told, broken]) is broken
    table = gate.format_checks([CHECK, worse, told]).splitlines()
    assert table[0].split() == ["stage", "quantity", "error", "bound", "seconds"]
    assert table[1].split() == ["flow_matching", "mel", "1.00e-02", "0.05", "1.00", "ok"]
    assert table[2].endswith("DRIFTS")
    assert table[3].split()[3] == "-"


def test_golden_answers_are_kept_and_must_be_finite(tmp_path):
    (tmp_path / GOLDEN).mkdir()
    asked, wanted = {"texts": np.array(["a", "ü"])}, {"mel": np.ones((2, 3), np.float32)}
    gate.write_golden(tmp_path, "flow_matching", asked, wanted)
    found = gate.read_golden(tmp_path, "flow_matching")
    assert found[0]["texts"].tolist() == ["a", "ü"]
    np.testing.assert_array_equal(found[1]["mel"], wanted["mel"])
    with pytest.raises(UserError, match="flow_matching: the model's own mel in float32 is not finite"):
        gate.write_golden(tmp_path, "flow_matching", asked, {"mel": np.array([np.inf])})


@pytest.mark.full
def test_questions_are_the_same_for_the_same_seed_and_fit_the_stages():
    stages, tokenizer, mask = small_engine.stages(), small_engine.tokenizer(), small_engine.make_engine().mels.mask
    bundle = Bundle(stages, tokenizer, {}, None)
    ask = lambda name, seed=0: gate.make_question(name, gate.find_stage(bundle, name), tokenizer, mask, seed)  # noqa: E731
    names = [name for name in gate.ORDER if gate.find_stage(bundle, name) is not None]
    assert names == ["tokenizer", "text_speech_lm", "flow_matching", "hift_vocoder", "speech_tokenizer"]
    first = {name: ask(name) for name in names}
    for name, question in first.items():
        for key, values in question.items():
            np.testing.assert_array_equal(values, ask(name)[key])
    assert first["flow_matching"]["prompt_mel"].shape == (2 * len(first["flow_matching"]["prompt_tokens"]), 5)
    assert not np.array_equal(first["hift_vocoder"]["mel"], ask("hift_vocoder", 1)["mel"])
    ids = gate.answer("tokenizer", tokenizer, mask, first["tokenizer"])
    assert ids["num_ids"].sum() == len(ids["ids"])
    assert ids["num_ids"][-1] == 0


def test_every_bound_is_stated_for_both_types():
    assert gate.BOUNDS["float32"].keys() == gate.BOUNDS["bfloat16"].keys()
    assert gate.BOUNDS["float32"]["drawn"] == 0
    assert gate.BOUNDS["bfloat16"]["drawn"] is None
    assert all(bound is not None for name, bound in gate.BOUNDS["bfloat16"].items() if name != "drawn")
