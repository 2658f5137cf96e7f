import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.batch import batch_hash, batch_spec, collate, num_token_slots
from cv2jax.data.buckets import Bucket
from cv2jax.text.characters import CharacterVocabulary
from tests.data.speech_files import make_record

BUCKET = Bucket(num_samples=960, num_text=8, batch_size=3, num_utterances=7)
VOCABULARY = CharacterVocabulary.from_counts("hi you")


def make_batch(**changes):
    records = [make_record(1, 500), make_record(2, 960, text=None), make_record(1, 500)]
    options = {
        "utterances": np.array([4, 9, 4]),
        "row_mask": np.array([True, True, False]),
        "encode_text": VOCABULARY.encode,
        "rate_hz": 24000,
    }
    return collate(records, BUCKET, **(options | changes))


def test_arrays_have_the_shapes_of_the_spec():
    for speakers in (None, np.array([2, 0, 2], np.int32)):
        batch = make_batch(speakers=speakers)
        spec = batch_spec(BUCKET, speaker=speakers is not None)
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec


def test_speech_tokens_fill_the_slots_of_their_audio():
    # 960 samples are one token slot of 40 ms; the records have 500 (one begun), 960 and 500 samples.
    batch = make_batch(encode_text=None, speech_tokens=[np.arange(n) + 7 for n in (1, 3, 0)], row_mask=np.ones(3, bool))
    spec = batch_spec(BUCKET, text=False, speech_tokens=1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec
    assert batch["speech_tokens"].tolist() == [[7], [7], [0]]
    assert batch["num_speech_tokens"].tolist() == [1, 1, 0]
    assert batch["row_mask"].tolist() == [True, True, False]
    assert not make_batch(speech_tokens=[np.arange(1)] * 3)["row_mask"][2]
    with pytest.raises(UserError, match=r"'u2' \(row 9\) has 4 speech tokens for 0.04 s of audio, which are 1; encode"):
        make_batch(speech_tokens=[np.arange(n) for n in (1, 4, 0)])


@pytest.mark.parametrize(("num_samples", "rate_hz", "slots"), [(1, 16000, 1), (640, 16000, 1), (96_001, 24000, 101)])
def test_slots_hold_the_token_begun(num_samples, rate_hz, slots):
    assert num_token_slots(num_samples, rate_hz) == slots


def test_content_is_padded_with_zeros():
    batch = make_batch(speakers=np.array([2, 0, 2], np.int32))
    np.testing.assert_array_equal(batch["waveform"][0, :500], make_record(1, 500).waveform)
    assert not batch["waveform"][0, 500:].any()
    assert batch["num_samples"].tolist() == [500, 960, 500]
    assert VOCABULARY.decode(batch["text_tokens"][0, :6]) == "hi you"
    assert batch["num_text_tokens"].tolist() == [6, 0, 6]
    assert not batch["text_tokens"][0, 6:].any()
    assert not batch["text_tokens"][1].any()
    assert batch["utterance"].tolist() == [4, 9, 4]
    assert batch["row_mask"].tolist() == [True, True, False]
    assert batch["speaker"].tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 16000}, r"'u1' \(row 4\) has 24000 Hz"),
        ({"encode_text": lambda text: np.arange(9)}, r"'u1' \(row 4\) encodes to 9 text tokens, its bucket holds 8"),
    ],
)
def test_records_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        make_batch(**changes)


def test_a_record_longer_than_its_index_says_is_named():
    with pytest.raises(UserError, match=r"'u3' \(row 7\) has 961 samples"):
        collate(
            [make_record(3, 961)],
            BUCKET,
            utterances=np.array([7]),
            row_mask=np.array([True]),
            encode_text=VOCABULARY.encode,
            rate_hz=24000,
        )


def test_hash_sees_every_array_and_not_its_place():
    batch = make_batch()
    assert batch_hash(batch) == batch_hash(dict(reversed(make_batch().items())))
    for name in batch:
        changed = make_batch()
        changed[name].flat[-1] ^= 1
        assert batch_hash(changed) != batch_hash(batch)
    assert batch_hash({"a": np.zeros(4, np.int32)}) != batch_hash({"a": np.zeros((2, 2), np.int32)})
