"""The main job end to end at its smallest, called twice; the ablation's table from real (tiny) runs; the report."""

import json

import pytest

from cv2jax.config import UserError
from cv2jax.jobs.ablate import ablate_quantizer
from cv2jax.jobs.corpus_plan import CorpusConfig
from cv2jax.jobs.quickstart import quickstart
from cv2jax.jobs.report import summarise, write_report
from cv2jax.train.metrics import read_metrics
from tests.small_corpus import make_small_corpus

TINY = (
    "model.width=16",
    "model.num_layers=1",
    "model.encoder2_layers=1",
    "model.decoder_layers=1",
    "model.codebook_size=32",
    "data.batch_seconds=16",
    "data.num_buckets=1",
    "num_steps=2",
    "log_every=1",
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    corpus = CorpusConfig(hours=0.012, num_voices=5, held_out_share=0.2)
    return out, corpus, quickstart(out, corpus, TINY, workers=1)


@pytest.mark.slow
def test_it_ends_with_a_page_and_figures(result):
    out, _, got = result
    assert got.exit_code == 0
    assert got.evaluation["step"] == 2
    assert got.page == out / "tokenizer" / "report.html"
    page = got.page.read_text()
    assert "held-out sentences never occur in training" in page
    assert f"{100 * got.evaluation['cer']:.2f} %" in page
    assert page.count("data:image/png;base64,") == 2
    for part in ("corpus/manifest.jsonl", "prepared/index.json", "tokenizer/checkpoints/2"):
        assert (out / part).exists()


@pytest.mark.slow
def test_a_second_call_finds_everything_done(result):
    out, corpus, first = result
    before = (out / "tokenizer" / "metrics.jsonl").read_bytes()
    again = quickstart(out, corpus, TINY, workers=1)
    assert again.evaluation == first.evaluation
    assert (out / "tokenizer" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_report_needs_an_evaluation(result, tmp_path):
    out, _, _ = result
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text((out / "tokenizer" / "run.json").read_text())
    with pytest.raises(UserError, match="no evaluation yet"):
        write_report(tmp_path)


def test_the_summary_is_in_per_cent():
    assert summarise({"cer": 0.0312, "codes_used": 812}) == {
        "character error rate, held out": "3.12 %",
        "codes used": "812",
    }


@pytest.mark.full  # a minute: three trainings
def test_the_ablation_trains_each_quantizer_and_writes_its_table(tmp_path):
    corpus = make_small_corpus(tmp_path / "c", num_train=16, num_test=4)
    code, table = ablate_quantizer(
        "speech_tokenizer_tiny", tmp_path / "runs", seeds=(0,), assignments=[f"data.corpus={corpus}", *TINY]
    )
    assert code == 0
    rows = [line for line in table.splitlines() if line.startswith(("| fsq", "| vq", "| none"))]
    assert len(rows) == 3
    assert (tmp_path / "runs" / "table.md").read_text() == table
    assert (tmp_path / "runs" / "table.png").read_bytes().startswith(b"\x89PNG")
    # The same order and budget for all of them.
    hashes = {
        name: [
            x["batch_hash"]
            for x in read_metrics(tmp_path / "runs" / f"{name}_0" / "metrics.jsonl")
            if x["kind"] == "train"
        ]
        for name in ("fsq", "vq", "none")
    }
    assert hashes["fsq"] == hashes["vq"] == hashes["none"]
    assert json.loads((tmp_path / "runs" / "table.json").read_text())["vq"][0]["codes_used"] <= 32


def test_the_ablation_varies_quantizer_and_seed_itself(tmp_path):
    for assignment in ("model.quantizer=vq", "seed=3"):
        with pytest.raises(UserError, match="varies it itself"):
            ablate_quantizer("speech_tokenizer_tiny", tmp_path, assignments=[assignment])


def test_the_ablation_refuses_a_seed_twice(tmp_path):
    with pytest.raises(UserError, match="--seeds: 3 is given twice"):
        ablate_quantizer("speech_tokenizer_tiny", tmp_path, seeds=(3, 1, 3))


def test_quickstart_makes_its_own_corpus(tmp_path):
    with pytest.raises(UserError, match=r"--set data.corpus=x: quickstart makes its own corpus"):
        quickstart(tmp_path / "q", CorpusConfig(hours=0.012, num_voices=5), ("data.corpus=x",))
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_another_config_in_the_same_place_names_the_flag(result):
    out, corpus, _ = result
    with pytest.raises(UserError, match=r"another config .*quickstart: --out"):
        quickstart(out, corpus, (*TINY, "optimizer.learning_rate=0.5"), workers=1)


def test_a_report_names_what_its_run_lacks(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {"name": "n"}, "facts": {}}')
    with pytest.raises(UserError, match=r"run\.json: its config lacks num_steps, evaluate_every"):
        write_report(tmp_path)
