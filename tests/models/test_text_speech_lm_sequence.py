"""The training layout: official targets and inputs, small rows by hand, properties over lengths and ratios, errors."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.models.text_speech_lm import sequence
from cv2jax.models.text_speech_lm.sequence import IGNORE, SPECIAL, SPEECH, TEXT
from tests.models.golden_lm import GOLDENS, NUM_SPEECH_TOKENS

TABLES = {
    SPECIAL: "llm_embedding.weight",
    TEXT: "llm.model.model.embed_tokens.weight",
    SPEECH: "speech_embedding.weight",
}
EOS, FILL = 100, 102  # of a codebook of 100
RATIOS = [(5, 15), (1, 1), (3, 7), (4, 2), (7, 20)]


def build(text, speech, bistream=False, **options):
    options = {"text_vocabulary_size": 1000, "num_speech_tokens": 100} | options
    return sequence.build_row(np.array(text, np.int32), np.array(speech, np.int32), bistream=bistream, **options)


def check_row(row, expected):
    """`expected`: (kind letter and token, target) of each position."""
    kinds = {"S": SPECIAL, "T": TEXT, "G": SPEECH}
    assert row.kind.tolist() == [kinds[name[0]] for name, _ in expected]
    assert row.token.tolist() == [int(name[1:]) for name, _ in expected]
    assert row.targets.tolist() == [target for _, target in expected]


@pytest.mark.parametrize("name", ["llm_uni_tiny", "llm_bi_tiny", "llm_mix_tiny"])
def test_rows_are_the_official_ones(name):
    golden, weights = np.load(GOLDENS / f"{name}.npz"), np.load(GOLDENS / "llm_tiny_weights.npz")
    num_text, num_speech = golden["text_token_len"], golden["speech_token_len"]
    bistream = sequence.is_bistream(golden["coins"], num_text, num_speech)
    rows = [
        sequence.build_row(
            golden["text_token"][i, : num_text[i]],
            golden["speech_token"][i, : num_speech[i]],
            bistream=bistream[i],
            text_vocabulary_size=512,
            num_speech_tokens=NUM_SPEECH_TOKENS,
        )
        for i in range(3)
    ]
    batch = sequence.collate(rows, golden["lm_target"].shape[1])
    np.testing.assert_array_equal(batch["targets"], golden["lm_target"])
    np.testing.assert_array_equal(batch["num_tokens"], golden["lm_input_len"])
    np.testing.assert_array_equal(sequence.row_length(num_text, num_speech), golden["lm_input_len"])
    for i, row in enumerate(rows):
        embedded = np.stack([weights[TABLES[kind]][token] for kind, token in zip(row.kind, row.token, strict=True)])
        np.testing.assert_allclose(embedded, golden["lm_input"][i, : len(row)], atol=1e-6)


def test_unistream_by_hand():
    expected = [("S0", -1), ("T7", -1), ("T8", -1), ("S1", 30), ("G30", 31), ("G31", 32), ("G32", EOS)]
    check_row(build([7, 8], [30, 31, 32]), expected)


def test_bistream_with_rests_by_hand():
    expected = [("S0", -1), ("T7", -1), ("T8", 30), ("G30", 31), ("G31", 32), ("G32", FILL)]
    expected += [("T9", -1), ("S1", 33), ("G33", 34), ("G34", EOS)]
    check_row(build([7, 8, 9], [30, 31, 32, 33, 34], bistream=True, ratio=(2, 3)), expected)


def test_bistream_without_rest_of_the_text_by_hand():
    expected = [("S0", -1), ("T7", 30), ("G30", 31), ("G31", FILL), ("T8", 32), ("G32", 33), ("G33", FILL)]
    check_row(build([7, 8], [30, 31, 32, 33, 34], True, ratio=(1, 2)), [*expected, ("S1", 34), ("G34", EOS)])
    check_row(build([7, 8], [30, 31, 32, 33], True, ratio=(1, 2)), [*expected, ("S1", EOS)])


def test_short_text_is_the_same_either_way():
    text, speech = [1, 2, 3, 4], list(range(40))
    uni, bi = build(text, speech), build(text, speech, bistream=True)
    np.testing.assert_array_equal([uni.token, uni.kind, uni.targets], [bi.token, bi.kind, bi.targets])


def test_an_instruction_is_text():
    row = build([900, 901, 999, 7], [1, 2])
    assert row.token[1:5].tolist() == [900, 901, 999, 7]
    assert row.kind[1:5].tolist() == [TEXT] * 4


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bistream", [False, True])
def test_properties_over_lengths(ratio, bistream):
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_text = int(rng.integers(1, 60))
        groups = num_text // ratio[0] if bistream else 0
        num_speech = groups * ratio[1] + int(rng.integers(0, 30))
        text, speech = rng.integers(0, 1000, num_text), rng.integers(0, 100, num_speech)
        row = build(text, speech, bistream, ratio=ratio)
        # Both sequences can be read back, and each speech token is predicted by the position before it.
        np.testing.assert_array_equal(row.token[row.kind == TEXT], text)
        np.testing.assert_array_equal(row.token[row.kind == SPEECH], speech)
        np.testing.assert_array_equal(row.token[row.kind == SPECIAL], [sequence.SOS, sequence.TASK])
        np.testing.assert_array_equal(row.targets[(row.targets != IGNORE) & (row.targets < 100)], speech)
        at = np.flatnonzero(row.kind == SPEECH)
        np.testing.assert_array_equal(row.targets[at - 1], speech)
        # Each full group: N text tokens, then M speech tokens and the fill predicted from the last text token on.
        step = sum(ratio)
        for group in range(groups):
            start = 1 + group * step
            assert row.kind[start : start + step].tolist() == [TEXT] * ratio[0] + [SPEECH] * ratio[1]
            assert row.targets[start : start + ratio[0] - 1].tolist() == [IGNORE] * (ratio[0] - 1)
            predicted = [*speech[group * ratio[1] : (group + 1) * ratio[1]], FILL]
            assert row.targets[start + ratio[0] - 1 : start + step].tolist() == predicted
        # Stops are never an input; as many fills as groups, one eos, at the end.
        assert row.token[row.kind == SPEECH].max(initial=0) < 100
        assert np.sum(row.targets == FILL) == groups
        assert np.flatnonzero(row.targets == EOS).tolist() == [len(row) - 1]
        assert len(row) == sequence.row_length(num_text, num_speech)
        assert np.sum(row.targets != IGNORE) == num_speech + groups + 1


@pytest.mark.parametrize("ratio", RATIOS)
def test_bistream_rows_always_have_speech_enough(ratio):
    num_text, num_speech = (a.ravel() for a in np.meshgrid(np.arange(1, 40), np.arange(1, 130), indexing="ij"))
    chosen = sequence.is_bistream(np.zeros(len(num_text)), num_text, num_speech, ratio)
    np.testing.assert_array_equal(chosen, num_speech * ratio[0] > num_text * ratio[1])  # strict, and exact in integers
    for n, m in zip(num_text[chosen][::17], num_speech[chosen][::17], strict=True):
        row = build(np.ones(n), np.ones(m), bistream=True, ratio=ratio)
        assert row.targets[-2] != FILL  # something is left to say behind the last group
        assert len(row) == sequence.row_length(int(n), int(m))


def test_coin_and_ratio_are_strict():
    assert sequence.is_bistream(0.49, 5, 16)
    assert not sequence.is_bistream(0.5, 5, 16)
    assert not sequence.is_bistream(0.49, 5, 15)
    assert not sequence.is_bistream(0.0, 0, 0)
    columns = sequence.is_bistream(np.array([0.1, 0.9, 0.1]), np.array([5, 5, 5]), np.array([16, 16, 15]))
    assert columns.tolist() == [True, False, False]


def test_lengths_of_narrow_columns_do_not_wrap():
    column = np.array([250], np.uint8)
    assert sequence.row_length(column, column).tolist() == [502]


def test_unsigned_tokens_of_shards():
    row = sequence.build_row(
        np.array([7], np.uint16), np.array([9], np.uint16), bistream=False, text_vocabulary_size=8, num_speech_tokens=10
    )
    check_row(row, [("S0", -1), ("T7", -1), ("S1", 9), ("G9", 10)])
    assert {a.dtype for a in (row.token, row.kind, row.targets)} == {np.dtype(np.int32)}


def test_stop_ids():
    assert (sequence.eos_id(6561), sequence.fill_id(6561)) == (6561, 6563)
    assert sequence.stop_ids(6561) == (6561, 6562, 6563)


def test_collate_pads_to_the_right():
    batch = sequence.collate([build([7], [30]), build([8, 9], [31, 32])], 7)
    assert batch["token"].tolist() == [[0, 7, 1, 30, 0, 0, 0], [0, 8, 9, 1, 31, 32, 0]]
    assert batch["kind"].tolist() == [[0, 1, 0, 2, 0, 0, 0], [0, 1, 1, 0, 2, 2, 0]]
    assert batch["targets"].tolist() == [[-1, -1, 30, EOS, -1, -1, -1], [-1, -1, -1, 31, 32, EOS, -1]]
    assert batch["num_tokens"].tolist() == [4, 6]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    assert sequence.collate([], 7)["targets"].shape == (0, 7)


@pytest.mark.parametrize(
    ("text", "speech", "options", "message"),
    [
        ([7, 1000], [1], {}, r"^u1: text token 1000 at 1 lies outside the vocabulary of 1000"),
        ([-1], [1], {}, r"^u1: text token -1 at 0 lies outside the vocabulary of 1000"),
        ([7], [1, 2, 100], {}, r"^u1: speech token 100 at 2 lies outside the vocabulary of 100"),
        ([7], [-1], {}, r"^u1: speech token -1 at 0 lies outside"),
        ([], [1], {}, r"^u1: has no text tokens"),
        (
            [7] * 10,
            [1] * 29,
            {"bistream": True},
            r"^u1: 29 speech tokens are too few .* 10 text tokens 5:15, .* takes 30",
        ),
        ([7] * 10, [1] * 29, {"max_length": 40}, r"^u1: 10 text and 29 speech tokens make a row of 41, more than 40"),
        ([7], [1], {"ratio": (0, 15)}, r"^ratio 0:15 of text to speech tokens"),
        ([7], [1], {"ratio": (5, -1)}, r"^ratio 5:-1 of text to speech tokens"),
    ],
)
def test_errors(text, speech, options, message):
    with pytest.raises(UserError, match=message) as error:
        build(text, speech, name="u1", **options)
    assert "\n" not in str(error.value)


def test_the_bounds_themselves_are_fine():
    assert len(build([0, 999], [0, 99], max_length=6)) == 6
    assert len(build([7] * 10, [1] * 30, bistream=True)) == 42


def test_ratio_of_the_coin_is_checked():
    with pytest.raises(UserError, match="ratio 0:15"):
        sequence.is_bistream(0.1, 5, 30, (0, 15))


def test_collate_refuses_a_row_that_does_not_fit():
    with pytest.raises(UserError, match=r"^row 1 of the batch has 6 positions, the batch only 5"):
        sequence.collate([build([7], [30]), build([8, 9], [31, 32])], 5)
