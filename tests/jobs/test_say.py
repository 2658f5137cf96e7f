"""`cv2jax say`: the same tokens for the same seed, each text with its status, whole or as it arrives; errors one line."""

import json

import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs.say import SayOptions, say
from cv2jax.synthesis.sampling import SamplingOptions
from tests.small_lm_run import make_run
from tests.small_token_corpus import NUM_CODES, make_small_token_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens", seed=3)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    make_run(workdir, corpus)
    return workdir


def tokens(spoken):
    return [one.result.speech_tokens.tolist() for one in spoken]


def test_a_seed_gives_its_tokens_and_a_text_does_not_depend_on_the_others(run):
    options = SayOptions(seed=3, max_length=12)
    both = say(run, ["one two", "six"], options)
    assert tokens(say(run, ["one two"], options)) == tokens(both)[:1]
    assert tokens(say(run, ["one two", "six"], SayOptions(seed=4, max_length=12))) != tokens(both)
    assert all(0 <= token < NUM_CODES for row in tokens(both) for token in row)
    assert all(one.heard is None for one in both)


def test_the_layout_and_the_prefix_change_what_is_said(run):
    greedy = SamplingOptions(temperature=0.0)
    texts = ["one two three four five six"]
    plain = SayOptions(sampling=greedy, max_length=20)
    variants = [plain, SayOptions(sampling=greedy, max_length=20, stream=True)]
    variants.append(SayOptions(sampling=greedy, max_length=20, speaker="A"))
    variants.append(SayOptions(sampling=greedy, max_length=20, instruct="softly"))
    said = [str(tokens(say(run, texts, options))) for options in variants]
    assert len(set(said)) == len(said)
    assert str(tokens(say(run, texts, plain))) == said[0]


def test_the_command_writes_tokens_with_their_status(run, tmp_path, capsys):
    out = tmp_path / "said.jsonl"
    words = ["say", str(run), "one two", "four", "--max_length=3", "--min_length=3", f"--out={out}"]
    assert run_cli(words) == 3  # no text comes to its end in three tokens
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["hit_limit"] * 2
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["one two", "four"]
    assert [line["status"] for line in lines] == ["hit_limit"] * 2
    assert [len(line["speech_tokens"]) for line in lines] == [3, 3]
    assert {line["tokenizer"] for line in lines} == {"0" * 64}


def test_a_model_that_is_not_finite_says_so(corpus, tmp_path):
    make_run(tmp_path / "run", corpus, "optimizer.ema_decay=0.0", poison=True)
    (said,) = say(tmp_path / "run", ["one"], SayOptions())
    assert said.result.status == "non_finite"
    assert not len(said.result.speech_tokens)


def test_bad_input_is_one_line(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    make_small_token_corpus(tmp_path / "other", seed=8)
    long = " ".join(["one"] * 40_000)
    for place, text, options, message in (
        (run, "  ", SayOptions(), "text 1: is empty"),
        (run, long, SayOptions(), "more than 32768; split the text"),
        (run, "one", SayOptions(instruct="a", speaker="b"), "one prefix"),
        (run, "one", SayOptions(min_length=9, max_length=3), "min <= max"),
        (run, "one", SayOptions(step=3), "no checkpoint of step 3"),
        (run, "one", SayOptions(text_tokenizer=str(tmp_path / "other" / "text_tokenizer")), "hash .* differs from"),
        (run, "one", SayOptions(speech_tokenizer=str(empty)), "holds no run"),
        (run, "one", SayOptions(sampling=SamplingOptions(top_p=0.0)), "sampling.top_p=0.0"),
        (empty, "one", SayOptions(), "holds no run"),
    ):
        with pytest.raises(UserError, match=message) as error:
            say(place, [text], options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "at least one TEXT"), (["nowhere", "a"], "holds no run"), (["RUN", "a", "--out=x.npz"], ".jsonl")],
)
def test_the_command_line_is_checked(run, words, message, capsys):
    assert run_cli(["say", *(str(run) if word == "RUN" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_texts_come_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", ["one\n", "\n", "two three\n"])
    assert run_cli(["say", str(run), "-", "--max_length=4", "--top_k=0", "--stream"]) in (0, 3)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-1] for line in printed] == ["one", "two three"]
    assert np.all([": " in line for line in printed])
