import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.batch import batch_hash, batch_spec, collate
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
