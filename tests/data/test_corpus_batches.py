"""Batches of audio, speech tokens and speakers: whoever loads them, the same; what has no tokens is masked or refused."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cv2jax.config import DataConfig, MeshConfig, TrainConfig, UserError
from cv2jax.data.batch import Batch, batch_hash
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.tokens import TokenWriter
from cv2jax.parallel.mesh import make_mesh
from tests.data.speech_files import make_record

RATE_HZ, SLOT = 24000, 960  # samples of a speech token
NUM_TRAIN, NUM_TEST = 29, 9
LENGTHS = np.random.default_rng(7).integers(3 * SLOT, 9 * SLOT, NUM_TRAIN + NUM_TEST).tolist()


def tokens_of(number: int, more: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 27, -(-LENGTHS[number] // SLOT) + more).astype(np.int32)


def write_tokens(path: pathlib.Path, numbers: range | list[int], more: int = 0, prefix: str = "u") -> pathlib.Path:
    with TokenWriter(path, {"tokenizer": "abc", "num_codes": 27}) as writer:
        for number in reversed(numbers):
            writer.write(f"{prefix}{number}", "a.wav", tokens_of(number, more), num_frames=4, seconds=0.1)
    return path


def write_records(path: pathlib.Path, text: str | None = "Hi, you!") -> pathlib.Path:
    records = [make_record(number, length, text) for number, length in enumerate(LENGTHS)]
    write_corpus(path, {"train": records[:NUM_TRAIN], "test": records[NUM_TRAIN:]}, rate_hz=RATE_HZ)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("flow") / "corpus")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tokens(tmp_path_factory.mktemp("flow") / "t.jsonl", range(NUM_TRAIN + NUM_TEST))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_batches(corpus: pathlib.Path, tokens: pathlib.Path | str, **data: object) -> CorpusBatches:
    fields = {"corpus": str(corpus), "speech_tokens": str(tokens), "batch_seconds": 1.5, "batch_multiple": 4}
    config = TrainConfig(
        name="small",
        task="flow_matching",
        model=None,
        num_steps=9,
        seed=5,
        data=DataConfig(**(fields | {"num_buckets": 3} | data)),
        evaluate_utterances=7,
    )
    return CorpusBatches(config, require_text=False, speech_tokens=True)


def load(batches: CorpusBatches, mesh: Mesh) -> list[Batch]:
    return [batch for _, _, batch in batches.training(0, 9, mesh)] + [batch for _, batch in batches.judged(mesh)]


def hashes(batches: CorpusBatches, mesh: Mesh) -> list[str]:
    return [batch_hash(batch) for batch in load(batches, mesh)]


def test_each_row_has_the_tokens_and_the_speaker_of_its_record(
    corpus: pathlib.Path, tokens: pathlib.Path, mesh: Mesh
) -> None:
    batches = make_batches(corpus, tokens)
    shapes = set()
    for _, num_rows, batch in batches.training(0, 9, mesh):
        shapes.add(batch["speech_tokens"].shape)
        assert batch["speech_tokens"].shape == (num_rows, batch["waveform"].shape[1] // SLOT)
        assert batch["row_mask"].all()
        for b, row in enumerate(batch["utterance"].tolist()):
            count = int(batch["num_speech_tokens"][b])
            assert batch["speech_tokens"][b, :count].tolist() == tokens_of(row).tolist()
            assert not batch["speech_tokens"][b, count:].any()
            assert batch["speaker"][b] == batches.train.speaker[row]
    assert len(shapes) == len(batches.plan.buckets) > 1
    judged = {}
    for _, batch in batches.judged(mesh):
        for row, speaker, count in zip(
            *(batch[name][batch["row_mask"]].tolist() for name in ("utterance", "speaker", "num_speech_tokens")),
            strict=True,
        ):
            judged[row] = (speaker, count)
    rows = [number * NUM_TEST // 7 for number in range(7)]
    assert judged == {i: (batches.held_out.speaker[row], len(tokens_of(NUM_TRAIN + row))) for i, row in enumerate(rows)}


def test_batches_have_the_shapes_they_promise(corpus: pathlib.Path, tokens: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus, tokens)
    promised = {
        tuple(sorted((name, spec.shape, str(spec.dtype)) for name, spec in shapes.items()))
        for shapes in batches.training_shapes() + batches.held_out_shapes()
    }
    found = {
        tuple(sorted((name, array.shape, str(array.dtype)) for name, array in batch.items()))
        for batch in load(batches, mesh)
    }
    assert found == promised
    assert not any(name.startswith(("text", "num_text")) for shapes in promised for name, _, _ in shapes)


def test_speakers_come_without_tokens_and_without_texts(
    corpus: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path
) -> None:
    silent = write_records(tmp_path / "none", None)
    for path in (corpus, silent):
        data = DataConfig(corpus=str(path), batch_seconds=1.5, batch_multiple=4)
        config = TrainConfig(name="small", task="speaker_encoder", model=None, num_steps=9, data=data)
        batches = CorpusBatches(config, require_text=False, speaker=True)
        assert batches.tokens is None
        for batch in load(batches, mesh):
            assert set(batch) == {"waveform", "num_samples", "utterance", "row_mask", "speaker"}
        for _, _, batch in batches.training(0, 3, mesh):
            assert batch["speaker"].tolist() == batches.train.speaker[batch["utterance"]].tolist()
        assert set(batches.training_shapes()[0]) == set(batch)


def test_neither_the_format_nor_who_reads_changes_a_batch(
    corpus: pathlib.Path, tokens: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path
) -> None:
    expected = hashes(make_batches(corpus, tokens), mesh)
    archive = write_tokens(tmp_path / "t.npz", range(NUM_TRAIN + NUM_TEST))
    assert hashes(make_batches(corpus, archive, num_threads=4), mesh) == expected
    for file in (tokens, archive):
        assert hashes(make_batches(corpus, file, num_workers=1), mesh) == expected
    changed = write_tokens(tmp_path / "u.npz", range(NUM_TRAIN + NUM_TEST), more=-1)
    assert not set(hashes(make_batches(corpus, changed), mesh)) & set(expected)
    # The file's own tokenizer and content, for what a run records.
    made = [make_batches(corpus, file).tokens for file in (tokens, archive, changed)]
    assert [file and file.tokenizer for file in made] == ["abc"] * 3
    assert len({file.hash for file in made if file}) == 3


def test_texts_have_no_say(tokens: pathlib.Path, corpus: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path) -> None:
    crowded, silent = write_records(tmp_path / "crowded", "Hi, you! " * 50), write_records(tmp_path / "none", None)
    expected = hashes(make_batches(corpus, tokens), mesh)
    for other in (crowded, silent):
        assert hashes(make_batches(other, tokens), mesh) == expected


def test_rows_without_tokens_are_masked_and_a_few_are_named(
    corpus: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = {1, 2, 5, 8, 11, 14, 17, NUM_TRAIN + 2}
    numbers = [number for number in range(NUM_TRAIN + NUM_TEST) if number not in lacking]
    batches = make_batches(corpus, write_tokens(tmp_path / "t.jsonl", numbers))
    caplog.clear()
    seen = set()
    for _, _, batch in batches.training(0, 2 * batches.plan.num_batches, mesh):
        seen |= set(batch["utterance"].tolist())
        has_tokens = [number not in lacking for number in batch["utterance"].tolist()]
        assert batch["row_mask"].tolist() == has_tokens == (batch["num_speech_tokens"] > 0).tolist()
        assert not batch["speech_tokens"][~batch["row_mask"]].any()
    assert seen == set(range(NUM_TRAIN))
    named = [message for message in caplog.messages if "is left out" in message]
    assert len(named) == len(set(named)) == 5
    assert [message.endswith("; others like it are not named") for message in named] == [False] * 4 + [True]


def test_a_few_tokens_too_many_are_cut(corpus: pathlib.Path, tokens: pathlib.Path, mesh: Mesh, tmp_path) -> None:
    everything = range(NUM_TRAIN + NUM_TEST)
    short, cut = (load(make_batches(corpus, write_tokens(tmp_path / f"{n}.npz", everything, n)), mesh) for n in (0, 2))
    for one, other in zip(short, cut, strict=True):
        for name in ("num_speech_tokens", "row_mask", "waveform"):
            np.testing.assert_array_equal(one[name], other[name])
    batches = make_batches(corpus, write_tokens(tmp_path / "3.npz", everything, 3))
    with pytest.raises(UserError, match=r"utterance 'u\d+' \(row \d+\) has \d+ speech tokens for 0\.\d\d s of audio"):
        load(batches, mesh)


def test_a_file_of_another_corpus_is_refused_at_once(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = write_tokens(tmp_path / "other.jsonl", range(NUM_TRAIN), prefix="wav/u")
    only_train = write_tokens(tmp_path / "train.npz", range(NUM_TRAIN))
    for file, split in ((other, "train"), (only_train, "test")):
        with pytest.raises(UserError, match=rf"{file.name}: has no tokens of 'u\d+' and \d+ others of split {split}"):
            make_batches(corpus, file)
    with pytest.raises(UserError, match=r"data\.speech_tokens is not set: give the file"):
        make_batches(corpus, "")
    with pytest.raises(UserError, match=r"gone\.npz: cannot read"):
        make_batches(corpus, tmp_path / "gone.npz")


def test_what_a_batch_holds_is_counted(corpus: pathlib.Path, tokens: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus, tokens)
    used = slots = 0.0
    for step, size, batch in batches.training(0, batches.plan.num_batches, mesh):
        content = batches.content(step, batch)
        assert (content.epoch, content.bucket) == batches.plan.batch(step)[:2]
        assert (content.num_utterances, content.unit) == (size, "audio_seconds")
        assert content.used == pytest.approx(batch["num_samples"].sum() / RATE_HZ)
        used, slots = used + content.used, slots + content.slots
    stats = batches.plan.stats
    assert slots >= stats.num_padded_samples / RATE_HZ  # and the rows that fill the last batches
    assert 1 - used / slots == pytest.approx(stats.padding_share, abs=0.02)
