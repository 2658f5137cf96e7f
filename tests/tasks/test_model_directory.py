"""A directory of one run a stage: what is found, what is missing and how to mend it."""

import json

import pytest

from cv2jax.config import UserError
from cv2jax.tasks.model_directory import (
    STAGES,
    find_voice,
    has_stage,
    learnt_encoder,
    require_same_encoder,
    require_same_tokenizer,
    stage_run,
)


def make_run(path, task, **facts):
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"config": {"task": task} if task else {}, "facts": facts}))
    return path


@pytest.fixture
def model(tmp_path):
    for task in STAGES[1:4]:
        make_run(tmp_path / "m" / task, task)
    return tmp_path / "m"


def test_runs_lie_there_or_are_linked_to(model, tmp_path):
    assert stage_run(model, "text_speech_lm") == model / "text_speech_lm"
    (model / "hift_vocoder").symlink_to(make_run(tmp_path / "runs" / "v", "hift_vocoder"))
    assert stage_run(str(model), "hift_vocoder") == model / "hift_vocoder"
    make_run(model / "speech_tokenizer", "")  # of a release that did not write the task down
    assert stage_run(model, "speech_tokenizer") == model / "speech_tokenizer"
    assert [task for task in STAGES if has_stage(model, task)] == list(STAGES)
    with pytest.raises(ValueError, match="vocoder is no stage"):
        stage_run(model, "vocoder")


def test_what_is_missing_is_named_with_its_mend(model, tmp_path):
    assert not has_stage(model, "hift_vocoder")
    with pytest.raises(
        UserError, match=r"m: has no hift_vocoder; train it there \(cv2jax train hift_vocoder_tiny --work"
    ) as e:
        stage_run(model, "hift_vocoder")
    assert str(e.value).endswith(f"or link a run: ln -s RUN {model}/hift_vocoder")
    (model / "hift_vocoder").symlink_to(tmp_path / "gone")
    assert has_stage(model, "hift_vocoder")
    with pytest.raises(UserError, match=r"hift_vocoder: links to .*gone, which is not there; train it"):
        stage_run(model, "hift_vocoder")
    make_run(model / "speech_tokenizer", "flow_matching")
    with pytest.raises(UserError, match="is a run of flow_matching; put a run of speech_tokenizer there"):
        stage_run(model, "speech_tokenizer")
    (tmp_path / "empty" / "flow_matching").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no run"):
        stage_run(tmp_path / "empty", "flow_matching")
    with pytest.raises(
        UserError, match=r"nowhere: no such model directory; make one .*speech_tokenizer, speaker_encoder"
    ):
        stage_run(tmp_path / "nowhere", "flow_matching")
    with pytest.raises(
        UserError, match=r"is a run of flow_matching, not a model directory; .* ln -s .*MODEL/flow_matching"
    ):
        stage_run(model / "flow_matching", "speech_tokenizer")


def test_voices_are_found_by_name_and_by_path(model):
    assert find_voice(model, "other/ann.safetensors").as_posix() == "other/ann.safetensors"
    with pytest.raises(UserError, match=r"m/voices: no voice 'ann'; it has none; give a \.safetensors file or"):
        find_voice(model, "ann")
    with pytest.raises(UserError, match=r"nowhere: no such model directory; give one, with voices in .*nowhere/voices"):
        find_voice(model / "nowhere", "ann")
    (model / "a.wav").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"a.wav: is no voice \(\.safetensors\); make one of a recording: cv2jax enroll"
    ):
        find_voice(model, str(model / "a.wav"))
    (model / "voices").mkdir()
    for name in ("zoe", "ann"):
        (model / "voices" / f"{name}.safetensors").write_bytes(b"")
    assert find_voice(model, "zoe") == model / "voices" / "zoe.safetensors"
    with pytest.raises(UserError, match="no voice 'bo'; it has ann, zoe"):
        find_voice(model, "bo")


def test_stages_that_learnt_from_other_tokens_are_refused(tmp_path):
    require_same_tokenizer(tmp_path, "a" * 64)  # has no stage that could differ
    make_run(tmp_path / "flow_matching", "flow_matching", speech_tokenizer="a" * 64)
    make_run(tmp_path / "text_speech_lm", "text_speech_lm", speech_tokenizer="")  # not known
    require_same_tokenizer(tmp_path, "a" * 64)
    with pytest.raises(
        UserError, match=r"flow_matching: learnt from tokens of a{12}, but the speech tokenizer is b{12}; put"
    ):
        require_same_tokenizer(tmp_path, "b" * 64)


@pytest.mark.parametrize(
    ("facts", "learnt"),
    [
        ({"speaker_embeddings": {"encoder": "a" * 64, "of": "speaker"}}, "a" * 64),
        ({"speaker_embeddings": "stand-in", "corpus_hash": "c"}, "stand-in"),
        ({"corpus_hash": "c"}, "stand-in"),  # of before there was a choice
        ({}, ""),  # imported before it was noted
    ],
)
def test_a_flow_that_learnt_from_another_encoder_is_refused(tmp_path, facts, learnt):
    require_same_encoder(tmp_path, "b" * 64)  # has no flow
    run = make_run(tmp_path / "flow_matching", "flow_matching", **facts)
    assert learnt_encoder(run) == learnt
    require_same_encoder(tmp_path, "a" * 64)
    if len(learnt) != 64:
        require_same_encoder(tmp_path, "b" * 64)
        return
    with pytest.raises(
        UserError,
        match=r"flow_matching: learnt from embeddings of speaker encoder a{12}, but .*/speaker_encoder is b{12}; put",
    ):
        require_same_encoder(tmp_path, "b" * 64)
