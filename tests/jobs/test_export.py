"""`cv2jax export`: bit for bit what the run holds, merged and averaged as asked, the tokenizer beside it, errors one line."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import LoraConfig
from cv2jax.convert.qwen import load_backbone
from cv2jax.nn.stack import stack_layers
from cv2jax.text.tokenizer import load_text_tokenizer
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.lora import LORA, load_lora
from cv2jax.train.state import evaluation_params
from tests.small_lm_run import make_run
from tests.small_token_corpus import make_small_token_corpus

NO_AVERAGE = "optimizer.ema_decay=0.0"
LORA_SETS = ("lora.rank=2", "lora.alpha=6", "lora.also_trained=('head_bias',)", "optimizer.ema_decay=0.5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens", seed=3)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    return workdir, make_run(workdir, corpus, "model.backbone.scan_layers=False", NO_AVERAGE, steps=(5, 7))


@pytest.fixture(scope="module")
def adapted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    return workdir, make_run(workdir, corpus, "model.backbone.scan_layers=True", *LORA_SETS)[5]


def export(*words):
    return run_cli(["export", *map(str, words)])


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def test_a_run_goes_to_hugging_face_and_back_bit_for_bit(plain, corpus, tmp_path, capsys):
    workdir, states = plain
    for words, step in (((), 7), (("--step", 5), 5)):
        out = tmp_path / f"{step}"
        assert export(workdir, "--to", "qwen2", "--out", out, *words) == 0
        assert f"{out}: qwen2, step {step}, 0.0" in capsys.readouterr().out
        params = states[step].params
        loaded = load_backbone(out)
        assert_same(loaded["text_embedding"], params["text_embedding"])
        assert_same(loaded["backbone"], stack_layers(params["backbone"]))
        ours, theirs = load_text_tokenizer(out), load_text_tokenizer(corpus / "text_tokenizer")
        assert ours.hash == theirs.hash
        assert json.loads((out / "config.json").read_text())["vocab_size"] == ours.vocabulary_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]


def merged(params, name):
    """A query kernel with its factors (alpha 6, rank 2), by numpy."""
    path = ("backbone", "blocks", "attention", name, "kernel")
    kernel, factors = params, params[LORA]
    for key in path:
        kernel, factors = kernel[key], factors[key]
    a, b = (np.asarray(factors[key], np.float64) for key in "ab")
    return np.asarray(kernel) + 3.0 * np.einsum("ndr,nrhc->ndhc", a, b)


@pytest.mark.parametrize("ema", [True, False])
def test_factors_are_merged_and_averages_taken(adapted, tmp_path, ema):
    workdir, state = adapted
    flag = () if ema else ("--noema",)
    params = evaluation_params(state) if ema else state.params
    assert export(workdir, "--to", "qwen2", "--out", tmp_path / "out", *flag) == 0
    loaded = load_backbone(tmp_path / "out")
    blocks, base = loaded["backbone"]["blocks"], state.params["backbone"]["blocks"]
    for name in ("query", "key"):
        np.testing.assert_allclose(blocks["attention"][name]["kernel"], merged(params, name), rtol=1e-5, atol=1e-5)
    assert_same(blocks["mlp"], base["mlp"])
    # The side file holds the same factors, and fits the base that they were trained on.
    path = tmp_path / "new" / "voice.safetensors"
    assert export(workdir, "--to", "lora", "--out", path, *flag) == 0
    frozen = {name: value for name, value in state.params.items() if name != LORA}
    restored, config = load_lora(path, frozen)
    assert config == LoraConfig(rank=2, alpha=6.0, also_trained=("head_bias",))
    assert_same(restored[LORA], params[LORA])
    assert_same(restored["head_bias"], params["head_bias"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_side_file_over_its_base_is_the_run_that_made_it(adapted, corpus, tmp_path, capsys):
    workdir, state = adapted
    base, file = tmp_path / "base", tmp_path / "voice.safetensors"
    old = make_run(base, corpus, "model.backbone.scan_layers=True", NO_AVERAGE)[5]
    frozen = {name: value for name, value in state.params.items() if name != LORA}
    # The file brings a head bias of its own: the base's may be any.
    frozen["head_bias"] = old.params["head_bias"]
    with Checkpoints(base / "checkpoints", keep=9) as checkpoints:
        checkpoints.save(6, dataclasses.replace(old, params=frozen))
    assert export(workdir, "--to", "lora", "--out", file) == 0
    variants = {"adapted": (workdir,), "base": (base, "--lora", file), "bare": (base,)}
    said = {}
    for name, words in variants.items():
        place = tmp_path / f"of {name}"
        assert export(*words, "--to", "qwen2", "--out", place) == 0
        spoken = (*words, "one two", "six", "--max_length=9", "--min_length=9", "--out", f"{place}.jsonl")
        assert run_cli(["say", *map(str, spoken)]) in (0, 3)
        said[name] = pathlib.Path(f"{place}.jsonl").read_text(), (place / "model.safetensors").read_bytes()
    assert said["adapted"] == said["base"]
    for one, other in zip(said["base"], said["bare"], strict=True):
        assert one != other
    capsys.readouterr()
    other = ("export", base, "--step=5", "--to=qwen2", f"--out={tmp_path / 'no'}")
    for words in (other, ("say", base, "one", "--step=5"), ("say", workdir, "one")):
        assert run_cli([*map(str, words), f"--lora={file}"]) == 2
        assert "voice.safetensors does not fit: base: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_average_of_a_run_that_trains_everything(corpus, tmp_path):
    state = make_run(tmp_path / "run", corpus, "optimizer.ema_decay=0.9")[5]
    assert export(tmp_path / "run", "--to=qwen2", f"--out={tmp_path / 'out'}", "--dtype=bfloat16") == 0
    want = evaluation_params(state)["text_embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    assert not np.array_equal(want, state.params["text_embedding"].astype(jnp.bfloat16).astype(jnp.float32))
    assert_same(load_backbone(tmp_path / "out")["text_embedding"], want)


def test_what_the_backbone_came_from_is_carried_but_for_its_tokenizer_files(plain, corpus, tmp_path):
    workdir, states = plain
    source = tmp_path / "source"
    assert export(workdir, "--to", "qwen2", "--out", source) == 0
    values = json.loads((source / "config.json").read_text()) | {"bos_token_id": 4}
    (source / "config.json").write_text(json.dumps(values))
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text("{}")
    moved = tmp_path / "moved"
    shutil.copytree(corpus / "text_tokenizer", moved)
    words = ("--carry_from", source, "--text_tokenizer", moved, "--step", 5)
    assert export(workdir, "--to", "qwen2", "--out", tmp_path / "out", *words) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"special_tokens_map.json"}
    assert_same(load_backbone(tmp_path / "out")["text_embedding"], states[5].params["text_embedding"])


@pytest.fixture(scope="module")
def wrong(plain, corpus, tmp_path_factory):
    """Places that are not fit, by name."""
    root = tmp_path_factory.mktemp("wrong")
    other = make_small_token_corpus(root / "other", seed=8)
    described = json.loads((plain[0] / "run.json").read_text())
    for name, change in (
        ("tokenizer", {"config": {"task": "speech_tokenizer"}}),
        ("young", {}),
        ("moved", {"config": described["config"] | {"data": {"corpus": str(root / "gone")}}}),
    ):
        (root / name / "checkpoints").mkdir(parents=True)
        (root / name / "run.json").write_text(json.dumps(described | change))
        if name != "young":
            shutil.copytree(plain[0] / "checkpoints", root / name / "checkpoints", dirs_exist_ok=True)
    make_run(root / "nan", corpus, NO_AVERAGE, poison=True)
    (root / "full").mkdir()
    (root / "full" / "file").write_text("")
    shutil.copytree(other / "text_tokenizer", root / "base")
    (root / "base" / "config.json").write_text("{}")
    return root


CASES = [
    ((), r"expected one RUN, got 0"),
    (("{plain}",), r"--to is missing"),
    (("{plain}", "--to=qwen2"), r"--out is missing"),
    (("{plain}", "--to=onnx", "--out={new}"), r"--to onnx: .* choose one of qwen2, lora"),
    (("{wrong}/nowhere", "--to=qwen2", "--out={new}"), r"nowhere holds no run"),
    (("{wrong}/young", "--to=qwen2", "--out={new}"), r"no checkpoint in .*young/checkpoints; train first"),
    (("{wrong}/tokenizer", "--to=qwen2", "--out={new}"), r"is a run of speech_tokenizer; give .* text_speech_lm"),
    (("{wrong}/tokenizer", "--to=lora", "--out={new}"), r"is a run of speech_tokenizer; give .* text_speech_lm"),
    (("{wrong}/nan", "--to=qwen2", "--out={new}"), r"checkpoints/5: holds NaN"),
    (("{plain}", "--to=qwen2", "--out={new}", "--step=6"), r"no checkpoint of step 6 .*one of 5, 7"),
    (("{plain}", "--to=qwen2", "--out={new}", "--dtype=int8"), r"--dtype int8: choose float32 or bfloat16"),
    (("{plain}", "--to=qwen2", "--out={wrong}/full"), r"full: exists already; give a new place"),
    (("{plain}", "--to=qwen2", "--out={wrong}/full/file"), r"file: exists already; give a new place"),
    (("{plain}", "--to=qwen2", "--out={wrong}/full/file/x"), r"full/file/x: cannot be written"),
    (("{plain}", "--to=qwen2", "--out={new}", "--carry_from={wrong}/full"), r"full: no config.json"),
    (("{plain}", "--to=qwen2", "--out={new}", "--carry_from={wrong}/base"), r"--carry_from .*base: its hash"),
    (("{plain}", "--to=qwen2", "--out={new}", "--text_tokenizer={wrong}/base"), r"--text_tokenizer .*differs from"),
    (("{plain}", "--to=qwen2", "--out={new}", "--text_tokenizer={wrong}/no"), r"tokenizer .*/no: no tokenizer there"),
    (("{wrong}/moved", "--to=qwen2", "--out={new}"), r"moved/text_tokenizer: .*gone; give its --text_tokenizer"),
    (("{plain}", "--to=lora", "--out={new}.safetensors"), r"trained without low-rank factors"),
    (("{adapted}", "--to=lora", "--out={new}"), r"ends in .safetensors"),
    (("{adapted}", "--to=lora", "--out={new}.safetensors", "--dtype=bfloat16"), r"--dtype is not for --to lora"),
    (("{adapted}", "--to=lora", "--out={new}.safetensors", "--carry_from=x"), r"--carry_from is not for --to lora"),
    (("{adapted}", "--to=lora", "--out={new}.safetensors", "--lora=x"), r"--lora is not for --to lora"),
    (("{plain}", "--to=qwen2", "--out={new}", "--lora={wrong}/no"), r"no does not exist"),
]


@pytest.mark.parametrize(("words", "message"), CASES, ids=[message[:30] for _, message in CASES])
def test_a_mistake_is_one_line_and_writes_nothing(words, message, plain, adapted, wrong, tmp_path, capsys):
    places = {"plain": plain[0], "adapted": adapted[0], "wrong": wrong, "new": tmp_path / "new" / "out"}
    assert export(*(word.format(**places) for word in words)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("cv2jax export: ")]
    assert re.search(message, line)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*unfinished"))
    assert [path.name for path in (wrong / "full").iterdir()] == ["file"]


def test_a_failure_at_the_end_leaves_nothing(plain, tmp_path, monkeypatch, capsys):
    def fail(self, directory: pathlib.Path):
        assert (directory / "model.safetensors").is_file()
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr("cv2jax.text.tokenizer.TextTokenizer.save", fail)
    assert export(plain[0], "--to", "qwen2", "--out", tmp_path / "out") == 2
    assert f"{tmp_path / 'out'}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
