"""The mask ablation on a corpus of tones: every model under every mask, resumable, and what it refuses."""

import json

import pytest

from cv2jax.config import UserError, load_config, override
from cv2jax.jobs.ablate_masks import ablate_masks, time_mask
from cv2jax.nn.masks import ChunkMask
from tests.small_flow_run import tokens_of
from tests.tasks.test_flow_matching import SMALL, corpus  # noqa: F401

SETS = (*SMALL, "model.mask_chunks=(0,5)", "model.mask_lefts=(-1,-1)", "model.mask_prompts=(0,0)", "num_steps=2")


def given(corpus):  # noqa: F811
    return [*SETS, "data.num_buckets=1", f"data.corpus={corpus}", f"data.speech_tokens={tokens_of(corpus)}"]


@pytest.mark.full
def test_every_model_is_heard_under_every_mask(corpus, tmp_path):  # noqa: F811
    code, table = ablate_masks("flow_matching_tiny", tmp_path, assignments=given(corpus))
    assert code == 0
    record = json.loads((tmp_path / "table.json").read_text())
    assert set(record["distances"]) == {"all", "chunk 5", "mixed"}
    assert all(set(row) == {"all", "chunk 5"} and min(row.values()) > 0 for row in record["distances"].values())
    assert record["times"]["all"]["first_seconds"] is None
    assert record["times"]["chunk 5"]["first_tokens"] == 8
    assert (tmp_path / "table.md").read_text() == table
    assert (tmp_path / "table.png").stat().st_size > 5000
    runs = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert runs == {"all", "chunk_5", "mixed"}


def test_what_cannot_be_compared_is_refused(corpus, tmp_path):  # noqa: F811
    for sets, message in (
        (["model.mask_per=batch"], "draws a mask an utterance"),
        (["model.mask_chunks=(5,5)"], "give two different masks"),
    ):
        with pytest.raises(UserError, match=message):
            ablate_masks("flow_matching_tiny", tmp_path, assignments=[*given(corpus), *sets])
    with pytest.raises(UserError, match=r"_tiny: is a preset of text_speech_lm; .* give one of flow_matching"):
        ablate_masks("text_speech_lm_tiny", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_hop_of_one_chunk_takes_some_time():
    config = override(load_config("flow_matching_tiny"), list(SMALL))
    times = time_mask(config.model, ChunkMask(chunk=50, left=10, prompt=3))
    assert times.first_tokens == 53
    assert times.first_seconds > 0
    assert times.hop_seconds > 0
