"""Batches of a token corpus: a function of the step alone, whoever loads them; each held-out utterance judged once."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cv2jax.config import DataConfig, MeshConfig, TrainConfig, UserError
from cv2jax.data.batch import Batch, batch_hash
from cv2jax.data.packed_batch import IGNORE, bistream_coins
from cv2jax.data.subset import spread_rows
from cv2jax.data.token_batches import TokenBatches
from cv2jax.data.token_corpus import TokenCorpus, TokenCorpusWriter, TokenRecord
from cv2jax.models.text_speech_lm.sequence import Row, build_row
from cv2jax.parallel.mesh import make_mesh
from tests.small_token_corpus import make_small_token_corpus

NUM_TRAIN, NUM_TEST, OVERHEAD = 37, 11, 2


def lay_out(record: TokenRecord, coin: float) -> Row:
    """Picklable; the coin shows in the layout, as often as in training."""
    return build_row(
        record.text_tokens,
        record.speech_tokens,
        bistream=coin < 0.5 and len(record.speech_tokens) > 3 * len(record.text_tokens),
        text_vocabulary_size=400,
        num_speech_tokens=27,
        ratio=(1, 3),
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens", NUM_TRAIN, NUM_TEST, seed=5)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_batches(
    corpus: pathlib.Path | str, *, evaluate_utterances: int = 0, seed: int = 3, **data: object
) -> TokenBatches:
    fields = {"corpus": str(corpus), "row_length": 120, "batch_rows": 4, "max_segments": 3} | data
    config = TrainConfig(
        name="small",
        task="text_speech_lm",
        model=None,
        num_steps=9,
        seed=seed,
        data=DataConfig(**fields),
        evaluate_utterances=evaluate_utterances,
    )
    return TokenBatches(config, overhead=OVERHEAD)


def load(batches: TokenBatches, mesh: Mesh, start: int = 0, end: int = 9) -> list[tuple[int, str]]:
    found = []
    for step, num_rows, batch in batches.training(start, end, mesh, lay_out):
        assert num_rows == 4
        found.append((step, batch_hash(batch)))
    return found


def show(batch: Batch) -> dict[int, Row]:
    """The rows of a batch's utterances, unpacked."""
    shown = {}
    for b, utterances in enumerate(batch["utterance"]):
        for number, utterance in enumerate(utterances[utterances >= 0].tolist(), 1):
            assert utterance not in shown
            where = batch["segments"][b] == number
            shown[utterance] = Row(*(batch[name][b, where] for name in ("token", "kind", "targets")))
    return shown


def same(left: Row, right: Row) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("token", "kind", "targets"))


@pytest.fixture(scope="module")
def unbroken(corpus: pathlib.Path, mesh: Mesh) -> list[tuple[int, str]]:
    """Steps 0 to 8, more than an epoch."""
    batches = make_batches(corpus)
    assert 1 < batches.plan.num_batches < 7
    return load(batches, mesh)


@pytest.mark.parametrize("start", [1, 4, 8, 9])
def test_any_step_is_a_place_to_start(
    corpus: pathlib.Path, mesh: Mesh, unbroken: list[tuple[int, str]], start: int
) -> None:
    assert [step for step, _ in unbroken] == list(range(9))
    assert load(make_batches(corpus), mesh, start) == unbroken[start:]


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"num_workers": 1}, {"num_workers": 2, "prefetch": 1}])
def test_whoever_reads_changes_nothing(
    corpus: pathlib.Path, mesh: Mesh, unbroken: list[tuple[int, str]], options: dict[str, int]
) -> None:
    assert load(make_batches(corpus, **options), mesh, 2) == unbroken[2:]


def test_the_seed_changes_every_batch(corpus: pathlib.Path, mesh: Mesh, unbroken: list[tuple[int, str]]) -> None:
    assert not set(load(make_batches(corpus, seed=4), mesh)) & set(unbroken)


def test_processes_load_their_rows_of_the_same_batches(
    corpus: pathlib.Path, mesh: Mesh, unbroken: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(part: int) -> list[tuple[list[Batch], list[Batch]]]:
        monkeypatch.setattr("cv2jax.data.token_batches.local_rows", lambda mesh, size: np.arange(size)[part::2])
        batches = make_batches(corpus)
        return [
            [batch for _, _, batch in batches.training(0, 9, mesh, lay_out)],
            [batch for _, batch in batches.judged(mesh, lay_out)],
        ]

    def join(parts: tuple[Batch, Batch]) -> Batch:
        return {name: np.stack([part[name] for part in parts], 1).reshape(4, -1) for name in parts[0]}

    training, judged = ([join(parts) for parts in zip(*kind, strict=True)] for kind in zip(of(0), of(1), strict=True))
    assert [(step, batch_hash(batch)) for step, batch in enumerate(training)] == unbroken
    monkeypatch.undo()
    whole = [batch_hash(batch) for _, batch in make_batches(corpus).judged(mesh, lay_out)]
    assert [batch_hash(batch) for batch in judged] == whole


def test_batches_have_the_shapes_they_promise(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus)
    promised = {name: (spec.shape, spec.dtype) for name, spec in batches.shapes().items()}
    found = [batch for _, _, batch in batches.training(0, 2, mesh, lay_out)]
    found += [batch for _, batch in batches.judged(mesh, lay_out)]
    for batch in found:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == promised


def test_an_epoch_shows_each_utterance_as_its_coin_says(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches, split = make_batches(corpus, batch_rows=1), TokenCorpus(corpus).split("train")
    size = batches.plan.num_batches
    epochs: list[dict[int, Row]] = [{}, {}]
    for step, _, batch in batches.training(0, 2 * size, mesh, lay_out):
        shown = show(batch)
        assert not shown.keys() & epochs[step // size].keys()
        epochs[step // size] |= shown
    for epoch, rows in enumerate(epochs):
        assert sorted(rows) == list(range(NUM_TRAIN))
        for utterance, row in rows.items():
            (coin,) = bistream_coins(3, epoch, np.array([utterance]))
            assert same(row, lay_out(split.read(utterance), float(coin)))
    changed = sum(not same(epochs[0][i], epochs[1][i]) for i in range(NUM_TRAIN))
    assert 0 < changed < NUM_TRAIN


@pytest.mark.parametrize("count", [0, 4, 99])
def test_judged_batches_show_each_held_out_utterance_once(corpus: pathlib.Path, mesh: Mesh, count: int) -> None:
    batches = make_batches(corpus, evaluate_utterances=count)
    shown: dict[int, Row] = {}
    for num_rows, batch in batches.judged(mesh, lay_out):
        assert num_rows == 4
        assert not shown.keys() & show(batch).keys()
        shown |= show(batch)
        empty = (batch["utterance"] < 0).all(axis=1)
        assert (batch["targets"][empty] == IGNORE).all()
        assert (batch["targets"][~empty] != IGNORE).any(axis=1).all()
    assert sorted(shown) == spread_rows(NUM_TEST, count).tolist()
    # Always laid out alike, whatever else is judged, so that curves can be compared.
    everything: dict[int, Row] = {}
    for _, batch in make_batches(corpus).judged(mesh, lay_out):
        everything |= show(batch)
    assert all(same(row, everything[utterance]) for utterance, row in shown.items())
    coins = bistream_coins(3, 2**31 - 1, np.arange(NUM_TEST)).tolist()
    assert all(same(lay_out(batches.held_out.read(u), coins[u]), row) for u, row in everything.items())


def test_what_has_no_text_or_speech_is_never_shown(corpus: pathlib.Path, mesh: Mesh, tmp_path: pathlib.Path) -> None:
    source, nothing = TokenCorpus(corpus), np.zeros(0, np.int32)
    with TokenCorpusWriter(tmp_path / "gaps", source.metadata) as writer:
        for name in source.splits:
            split = source.split(name)
            for row in range(len(split)):
                lacks = {0: {"text_tokens": nothing}, 1: {"speech_tokens": nothing}}.get(row % 4, {})
                writer.write(name, dataclasses.replace(split.read(row), **lacks))
    batches = make_batches(tmp_path / "gaps")
    assert batches.plan.stats.left_out == {"without text": 10, "without speech": 9, "empty": 0, "too long": 0}
    trained = {u for _, _, batch in batches.training(0, batches.plan.num_batches, mesh, lay_out) for u in show(batch)}
    judged = {u for _, batch in batches.judged(mesh, lay_out) for u in show(batch)}
    assert trained == {i for i in range(NUM_TRAIN) if i % 4 > 1}
    assert judged == {2, 3, 6, 7, 10}
    assert [record.id for record in batches.examples(0)] == [f"u{NUM_TRAIN + i}" for i in sorted(judged)]
    assert [record.id for record in batches.examples(2)] == [f"u{NUM_TRAIN + i}" for i in (2, 6)]


def test_utterances_are_named_row_by_row(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus)
    for step, _, batch in batches.training(0, 9, mesh, lay_out):
        names = [" + ".join(f"u{i}" for i in row if i >= 0) for row in batch["utterance"].tolist()]
        assert batches.utterance_ids(step) == names
    assert any(" + " in name for name in batches.utterance_ids(0))


def test_an_utterance_longer_than_a_row_is_left_out(corpus: pathlib.Path) -> None:
    split = TokenCorpus(corpus).split("train")
    lengths = np.asarray(split.num_text) + np.asarray(split.num_speech) + OVERHEAD
    cap = int(np.sort(lengths)[NUM_TRAIN // 2])
    assert make_batches(corpus, row_length=cap).plan.stats.left_out["too long"] == (lengths > cap).sum() > 0


def test_what_cannot_be_batched_is_a_user_error(corpus: pathlib.Path, tmp_path: pathlib.Path, mesh: Mesh) -> None:
    speakers = make_small_token_corpus(tmp_path / "speakers", 4, 2, prefix="speaker")
    assert make_batches(speakers, prefix="speaker").corpus.metadata.prefix == "speaker"
    assert make_batches(speakers).corpus.metadata.prefix == "speaker"
    for place, data, message in (
        (
            speakers,
            {"prefix": "none"},
            r"speakers: its texts have the prefix speaker; .*--prefix none, or set data\.prefix=s",
        ),
        (corpus, {"prefix": "instruct"}, r"tokens: its texts have the prefix none; .*--prefix instruct"),
        ("", {}, r"^data\.corpus is not set: give --corpus DIR.*cv2jax tokenize"),
        (tmp_path / "nowhere", {}, "nowhere"),
        (corpus, {"train_split": "dev"}, "no split 'dev'; it has train, test"),
        (corpus, {"eval_split": "dev"}, "no split 'dev'; it has train, test"),
        (corpus, {"row_length": 3}, "split train: no utterance of 37 is left to pack in rows of 3"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            make_batches(place, **data)
        assert "\n" not in str(raised.value)
    three = make_mesh(MeshConfig(data=3), jax.devices()[:3])
    with pytest.raises(UserError, match="a batch of 4 rows does not divide"):
        next(make_batches(corpus).training(0, 9, three, lay_out))


def test_what_a_batch_holds_is_counted(corpus: pathlib.Path, mesh: Mesh) -> None:
    batches = make_batches(corpus)
    for step, _, batch in batches.training(0, 5, mesh, lay_out):
        content = batches.content(step, batch)
        assert (content.epoch, content.bucket, content.unit) == (batches.plan.batch(step)[0], 0, "tokens")
        assert content.num_utterances == np.count_nonzero(batch["utterance"] >= 0)
        assert (content.used, content.slots) == (sum(len(row.token) for row in show(batch).values()), 480)
