"""`cv2jax import --from official`: runs that train and speak, in any size; mistakes are one line and leave nothing."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cv2jax.cli.main import run as run_cli
from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.convert.flow import flow_rules
from cv2jax.convert.official import llm_rules
from cv2jax.convert.rules import foreign_tensors
from cv2jax.jobs.official_files import load_kept
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.synthesis.voice import load_voice
from cv2jax.tasks import make_task
from cv2jax.tasks.encoders import load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_directory import learnt_encoder, require_same_tokenizer, stage_run
from cv2jax.tasks.trained import load_flow, load_vocoder
from cv2jax.text.tokenizer import load_text_tokenizer
from cv2jax.train.gan_step import GENERATOR
from cv2jax.train.state import make_state
from tests.models.golden_hift import GOLDENS, golden_params
from tests.official_directory import write_directory
from tests.small_flow_run import NUM_CODES, SMALL_FLOW, make_small_flow_corpus, tokens_of
from tests.small_model_directory import ENCODER, TOKENIZER
from tests.small_token_corpus import SMALL_LM, make_small_token_corpus
from tests.small_vocoder_run import SMALL_GENERATOR

GOLDEN = pathlib.Path(GOLDENS) / "official_model_tiny"
FLOW = FlowMatchingConfig(
    num_speech_tokens=NUM_CODES,
    speaker_dim=8,
    encoder=FlowEncoderConfig(width=16, num_heads=2, mlp_dim=16, num_layers=1, num_upsampled_layers=1),
    estimator=EstimatorConfig(width=16, num_blocks=1, num_mid_stages=1, num_heads=2, head_dim=8),
    mask_chunks=(0, 25),
    mask_lefts=(-1, -1),
    mask_prompts=(0, 0),
)
HIFT = HiftVocoderConfig(**SMALL_GENERATOR)


def small_lm(vocabulary_size):
    backbone = Qwen2Config(
        vocabulary_size=vocabulary_size, width=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2
    )
    return TextSpeechLmConfig(backbone=backbone, num_speech_tokens=NUM_CODES, mix_ratio=(1, 3))


def run(*words):
    return run_cli(["import", *map(str, words)])


def refused(capfd, *words):
    assert run(*words) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax import:")]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected one DIR, got 0"),
        (("a", "b"), "expected one DIR, got 2"),
        (("a",), "--from is missing"),
        (("a", "--from=official"), "--to is missing"),
        (("a", "--from=bundle", "--to=b"), "--from bundle: there is no such form; choose official"),
        (("{tmp}/nowhere", "--from=official", "--to={tmp}/m"), "nowhere: there is no such directory"),
        (("{tmp}", "--from=official", "--to={tmp}/full"), "--to .*full: exists already; give a new place"),
        (("{tmp}", "--from=official", "--to={tmp}/full/file"), "file: exists already"),
        (("{tmp}/full", "--from=official", "--to={tmp}/m"), r"lacks cosyvoice2\.yaml, hift\.pt, flow\.pt, llm\.pt, .*campplus"),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense(words, message, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert re.search(message, refused(capfd, *(word.format(tmp=tmp_path) for word in words)))
    assert os.listdir(tmp_path) == ["full"]


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(capfd, GOLDEN, "--from=official", f"--to={tmp_path / 'm'}")
    assert "pip install 'cv2jax[official]'" in line
    assert os.listdir(tmp_path) == []


def overwrite(path, data):
    path.write_bytes(data)


def backbone_file(directory, name):
    return directory / "CosyVoice-BlankEN" / name


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_tensor(path):
    save_file({"w": np.ones((3, 3), np.float32)}, path)


def change_tensor(directory, file, change):
    torch = pytest.importorskip("torch")
    tensors = dict(torch.load(directory / file, weights_only=True))
    change(tensors, torch)
    torch.save(tensors, directory / file)


def change_yaml(directory, old, new):
    text = (directory / "cosyvoice2.yaml").read_text()
    assert old in text
    (directory / "cosyvoice2.yaml").write_text(text.replace(old, new, 1))


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def add_code(directory, file):
    torch = pytest.importorskip("torch")
    content = torch.load(directory / file, weights_only=True)
    torch.save(dict(content) | {"evil": Evil(f"touch {directory.parent / 'ran'}")}, directory / file)


def add_file(directory, name, change):
    """A sound file of torch's or ONNX beside the model, changed."""
    torch = pytest.importorskip("torch")
    if name.endswith("onnx"):
        shutil.copyfile(directory / "campplus.onnx", directory / name)
    elif name.endswith("safetensors"):
        shutil.copyfile(backbone_file(directory, "model.safetensors"), directory / name)
    else:
        torch.save({"w": torch.ones(300)}, directory / name)
    change(directory / name)


def add_pickle(directory, name, protocol):
    (directory / name).write_bytes(pickle.dumps(Evil(f"touch {directory.parent / 'ran'}"), protocol))


def add_script(directory, name):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3)}, directory / name)
    with zipfile.ZipFile(directory / name, "a") as archive:
        archive.writestr(f"{pathlib.Path(name).stem}/constants.pkl", pickle.dumps(()))


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD = [
    (lambda d: (d / "flow.pt").unlink(), r"golden: lacks flow\.pt; copy the whole"),
    (lambda d: (d / "llm.pt").rename(d / "llm2.pt"), r"lacks llm\.pt \(there is llm2\.pt: is that it\?\)"),
    (lambda d: shutil.rmtree(d / "CosyVoice-BlankEN"), r"lacks CosyVoice-BlankEN/config\.json"),
    (lambda d: (d / "CosyVoice-BlankEN" / "vocab.json").unlink(), r"CosyVoice-BlankEN: no tokenizer there"),
    (lambda d: overwrite(d / "hift.pt", (d / "hift.pt").read_bytes()[:300_000]), r"hift\.pt: is cut short"),
    (lambda d: overwrite(d / "llm.pt", b"not a pickle"), r"llm\.pt: is no file of torch\.save"),
    (lambda d: overwrite(d / "flow.pt", (d / "hift.pt").read_bytes()), r"flow\.pt does not fit the model: \d+ missing"),
    (lambda d: overwrite(d / "cosyvoice2.yaml", b"llm: ["), r"cosyvoice2\.yaml: is no YAML"),
    (lambda d: change_yaml(d, "get_tokenizer:", "other:"), r"cosyvoice2\.yaml: has no get_tokenizer; is it cut short"),
    (lambda d: change_yaml(d, "win_size: 1920", "win_size: 1024"), r"feat_extractor\.win_size is 1024, and .* only 1920"),
    (lambda d: cut(backbone_file(d, "model.safetensors")), r"BlankEN/model\.safetensors: is damaged"),
    (lambda d: one_tensor(backbone_file(d, "model.safetensors")), r"BlankEN does not fit .*: 26 missing: .*left over: w"),
    (lambda d: cut(backbone_file(d, "generation_config.json")), r"BlankEN/generation_config\.json: cannot be read"),
    (lambda d: overwrite(d / "flow.decoder.estimator.fp32.onnx", b"abc"), r"estimator\.fp32\.onnx: is damaged"),
    (lambda d: overwrite(d / "campplus.onnx", (d / "campplus.onnx").read_bytes()[:500]), r"campplus\.onnx: is damaged"),
    (lambda d: overwrite(d / "speech_tokenizer_v2.onnx", b""), r"speech_tokenizer_v2\.onnx: is damaged"),
    (lambda d: overwrite(d / "spk2info.pt", b"x"), r"spk2info\.pt: is no file of torch\.save"),
    (lambda d: change_yaml(d, "vocab_size: 61", "vocab_size: 62"), r"flow\.vocab_size is 62, but .* of flow\.pt has 61"),
    (lambda d: change_yaml(d, "fmax: 8000", "fmax: 12000"), r"feat_extractor, hift: mel of another definition: mel_fmax_hz"),
    (lambda d: change_json(d / "CosyVoice-BlankEN" / "config.json", hidden_size=64), r"config\.json: hidden_size is 64, but"),
    (lambda d: change_tensor(d, "llm.pt", lambda t, _: t.update({"llm_decoder.extra": t.pop("llm_decoder.bias")})),
     r"llm\.pt does not fit the model: 1 missing: llm_decoder\.bias; 1 left over: llm_decoder\.extra"),
    (lambda d: change_tensor(d, "hift.pt", lambda t, _: t.update({"conv_post.bias": t["conv_post.bias"][:3]})),
     r"hift\.pt does not fit the model: 1 of another shape: conv_post\.bias is \[3\] and must be \[18\]"),
    (lambda d: change_tensor(d, "flow.pt", lambda t, torch: t.update({"encoder_proj.bias": t["encoder_proj.bias"].int()})),
     r"flow\.pt: encoder_proj\.bias is int32; give weights in fp32, bf16 or fp16"),
    (lambda d: change_tensor(d, "hift.pt", lambda t, _: t["conv_post.bias"].fill_(float("nan"))),
     r"hift\.pt: conv_post\.bias has values that are not finite"),
    (lambda d: change_tensor(d, "spk2info.pt", lambda t, torch: t.update({"a": {"embedding": torch.ones(1, 9)}})),
     r"spk2info\.pt: speaker 'a': has an embedding of 9, and cosyvoice2\.yaml says flow\.spk_embed_dim 24"),
    (lambda d: change_tensor(d, "spk2info.pt", lambda t, torch: t.update({"a": {}})), "speaker 'a': has no embedding"),
    (lambda d: add_code(d, "llm.pt"), r"llm\.pt: names code \((posix|os)\.system\), and was refused; nothing of it was run"),
    (lambda d: add_file(d, "speech_tokenizer_v2.batch.onnx", cut), r"v2\.batch\.onnx: is damaged .*, or leave the file out"),
    (lambda d: add_file(d, "flow.cache.pt", cut), r"flow\.cache\.pt: is cut short; copy it again, or leave the file out"),
    (lambda d: add_file(d, "CosyVoice-BlankEN/pytorch_model.bin", cut), r"BlankEN/pytorch_model\.bin: is cut short"),
    (lambda d: add_file(d, "vllm.safetensors", cut), r"vllm\.safetensors: is damaged or unreadable"),
    (lambda d: add_file(d, "flow.encoder.fp16.zip", cut), r"flow\.encoder\.fp16\.zip: is cut short"),
    (lambda d: add_file(d, "llm.rl.pt", lambda path: add_code(d, path.name)),
     r"llm\.rl\.pt: names code \((posix|os)\.system\), and was"),
    (lambda d: add_script(d, "other.pt"), r"other\.pt: is a TorchScript archive, which is code, and was refused"),
    (lambda d: add_pickle(d, "training_args.bin", 4), r"training_args\.bin: is no file of torch\.save"),
    (lambda d: add_pickle(d, "old.bin", 0), r"old\.bin: is no file of torch\.save"),
    (lambda d: overwrite(d / "rank0.engine", b"version https://git-lfs.github.com/spec/v1\n"),
     r"rank0\.engine: is only git's pointer"),
    (lambda d: add_code(d, "spk2info.pt"), r"spk2info\.pt: names code \((posix|os)\.system\), and was refused"),
]  # fmt: skip


@pytest.mark.official
@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_spoilt_directory_is_one_line_and_leaves_nothing(spoil, message, tmp_path, capfd):
    pytest.importorskip("torch")
    spoilt = tmp_path / "golden"
    shutil.copytree(GOLDEN, spoilt)
    spoil(spoilt)
    assert re.search(message, refused(capfd, spoilt, "--from=official", f"--to={tmp_path / 'm'}"))
    assert os.listdir(tmp_path) == [
        "golden"
    ]  # neither the target, nor a half of it, nor what code in it would have made


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden directory with a trap in its YAML and a file of its own, imported."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN, root / "official")
    text = (root / "official" / "cosyvoice2.yaml").read_text()
    trap = f"__seed: !apply:os.system ['touch {root / 'ran'}']\nodd: !!python/object/apply:os.system ['touch {root / 'ran'}']\n"
    (root / "official" / "cosyvoice2.yaml").write_text(trap + text + "train: !new:strange.Class {x: !apply:a.b []}\n")
    (root / "official" / "asset").mkdir()
    (root / "official" / "asset" / "note.txt").write_text("hello")
    (root / "official" / "config.json").write_text("{}")
    (root / "official" / "strange.txt").write_text("?")
    for hidden in (".git", ".cache"):
        (root / "official" / hidden).mkdir()
        (root / "official" / hidden / "big").write_text("not of the model")
    (root / "official" / "CosyVoice-BlankEN").rename(root / "blank")  # as some caches lay it out
    (root / "official" / "CosyVoice-BlankEN").symlink_to(root / "blank")
    (root / "official" / "asset" / "up").symlink_to(root / "official")  # in a circle
    assert run(root / "official", "--from=official", f"--to={root / 'model'}") == 0
    return root


@pytest.mark.official
def test_yaml_with_code_is_read_and_nothing_of_it_is_run(golden):
    assert sorted(os.listdir(golden)) == ["blank", "model", "official"]
    kept = (golden / "model" / "official" / "cosyvoice2.yaml").read_bytes()
    assert kept == (golden / "official" / "cosyvoice2.yaml").read_bytes()


@pytest.mark.official
def test_what_is_not_understood_is_kept_and_told(golden, tmp_path, caplog):
    assert run(golden / "official", "--from=official", f"--to={tmp_path / 'model'}") == 0
    assert "speech_tokenizer_v2.onnx: is not a graph that is known here" in caplog.text
    assert "campplus.onnx: is not a graph that is known here" in caplog.text
    warned = [r.getMessage() for r in caplog.records if "unknown files are carried through unchanged" in r.getMessage()]
    assert warned == [f"{golden / 'official'}: unknown files are carried through unchanged: strange.txt"]
    kept = load_kept(tmp_path / "model")
    assert not [name for name in kept.names if name.startswith((".", "asset/up"))]
    assert {
        "asset/note.txt",
        "config.json",
        "strange.txt",
        "campplus.onnx",
        "hift.pt",
        "CosyVoice-BlankEN/model.safetensors",
    } <= set(kept.names)
    assert not {"llm.pt", "flow.pt"} & set(kept.names)
    for name in kept.names:
        assert (golden / "official" / name).read_bytes() == (kept.place / name).read_bytes()


@pytest.mark.official
def test_runs_of_the_golden_load_with_its_numbers(golden):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, params = load_vocoder(stage_run(golden / "model", "hift_vocoder"), mesh)
    jax.tree.map(np.testing.assert_array_equal, params, golden_params())
    config, params = load_flow(stage_run(golden / "model", "flow_matching"), mesh)
    assert (config.mask_chunks, config.loss, config.mask_per) == ((0, 5), "mse", "batch")
    weights = np.load(GOLDENS / "flow_tiny_weights.npz")
    np.testing.assert_array_equal(params["encoder"]["token_embedding"], weights["input_embedding.weight"])
    ours = load_text_tokenizer(golden / "model" / "text_speech_lm" / "text_tokenizer")
    assert ours.hash == load_text_tokenizer(GOLDEN / "CosyVoice-BlankEN").hash
    voice = load_voice(golden / "model" / "voices" / "spk0.safetensors")
    assert (voice.name, voice.speaker_embedding.shape, len(voice.speech_tokens)) == ("spk0", (24,), 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens", seed=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory, corpus):
    """A directory of other sizes with graphs that are known, imported."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("other")
    lm = small_lm(load_text_tokenizer(corpus / "text_tokenizer").vocabulary_size)
    tokenizer, speaker = dataclasses.replace(TOKENIZER, fsq_dim=3), dataclasses.replace(ENCODER, embedding_dim=8)
    texts = {"text_tokenizer": corpus / "text_tokenizer"}
    write_directory(root / "official", lm, FLOW, HIFT, tokenizer, speaker, seed=5, **texts)
    assert run(root / "official", "--from=official", f"--to={root / 'model'}") == 0
    return root


@pytest.mark.official
def test_known_graphs_become_runs(other):
    model = other / "model"
    tokenizer = load_tokenizer(stage_run(model, "speech_tokenizer"))
    assert (tokenizer.config.width, tokenizer.config.num_codes) == (TOKENIZER.width, NUM_CODES)
    require_same_tokenizer(model, tokenizer.hash)
    for stage in ("text_speech_lm", "flow_matching"):
        assert json.loads((model / stage / "run.json").read_text())["facts"]["speech_tokenizer"] == tokenizer.hash
    encoder = load_speaker_encoder(stage_run(model, "speaker_encoder"))
    assert learnt_encoder(model / "flow_matching") == encoder.hash
    assert (encoder.config.embedding_dim, encoder.config.growth, encoder.step) == (8, ENCODER.growth, 0)
    assert not {"campplus.onnx", "speech_tokenizer_v2.onnx"} & set(load_kept(model).names)


def warm(config, *sets):
    """The state from which a run of the config starts."""
    config = override(config, ["num_steps=1", *sets])
    task = make_task(config)
    _, shardings = abstract_state(task.init_state, make_mesh(MeshConfig(), jax.devices()[:1]))
    return task.warm_start(make_state(task.init_state, shardings, jax.random.key(0)))


def assert_official(rules, params, file):
    torch = pytest.importorskip("torch")
    theirs = torch.load(file, weights_only=True)
    for name, tensor in foreign_tensors(rules, params, "ours").items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].numpy(), err_msg=name)


@pytest.mark.official
@pytest.mark.parametrize("scan", [True, False])
def test_training_starts_from_the_language_model_and_it_speaks(other, corpus, tmp_path, scan):
    run_of = other / "model" / "text_speech_lm"
    sets = [f"model.backbone.scan_layers={scan}", *SMALL_LM, f"data.corpus={corpus}", f"init_from={run_of}"]
    state = warm(load_config("text_speech_lm_tiny"), *sets)
    assert_official(llm_rules(), state.params, other / "official" / "llm.pt")
    if not scan:
        return
    spoken = ("say", run_of, "one two", "--max_length=6", "--min_length=6", "--out", tmp_path / "said.jsonl")
    assert run_cli([*map(str, spoken)]) in (0, 3)
    assert len(json.loads((tmp_path / "said.jsonl").read_text())["speech_tokens"]) == 6


@pytest.mark.official
@pytest.mark.parametrize("scan", [True, False])
def test_training_starts_from_the_flow(other, tmp_path, scan):
    prepared = make_small_flow_corpus(tmp_path / "corpus")
    sets = [
        *SMALL_FLOW,
        f"model.scan_layers={scan}",
        f"data.corpus={prepared}",
        f"data.speech_tokens={tokens_of(prepared)}",
    ]
    state = warm(load_config("flow_matching_tiny"), *sets, f"init_from={other / 'model' / 'flow_matching'}")
    assert_official(flow_rules(), state.params, other / "official" / "flow.pt")


@pytest.mark.official
def test_training_starts_from_the_vocoder(other, tmp_path):
    from tests.small_vocoder_run import SMALL_VOCODER, make_small_vocoder_corpus

    prepared = make_small_vocoder_corpus(tmp_path / "corpus")
    sets = [*SMALL_VOCODER, "model.generator.num_harmonics=8", f"data.corpus={prepared}"]
    run_of = other / "model" / "hift_vocoder"
    state = warm(load_config("hift_vocoder_tiny"), *sets, f"init_from={run_of}")  # of other units
    _, params = load_vocoder(run_of, make_mesh(MeshConfig(), jax.devices()[:1]))
    ours, theirs = state.params[GENERATOR]["generator"], params["generator"]
    np.testing.assert_array_equal(ours["upsample_2"]["kernel"], 16 * theirs["upsample_2"]["kernel"])
    np.testing.assert_array_equal(ours["conv_out"]["kernel"], theirs["conv_out"]["kernel"])


@pytest.mark.official
def test_training_does_not_replace_what_was_imported(other, corpus, tmp_path, capfd):
    place = shutil.copytree(other / "model" / "text_speech_lm", tmp_path / "run")
    before = (place / "run.json").read_bytes()
    words = ["train", "text_speech_lm_tiny", f"--workdir={place}", f"--corpus={corpus}", "--set=num_steps=1"]
    assert run_cli(words) == 2
    assert f"{place}: holds imported weights, which training would replace; train in another" in capfd.readouterr().err
    assert (place / "run.json").read_bytes() == before


@pytest.mark.official
def test_graphs_of_other_sizes_are_a_contradiction(other, tmp_path, capfd):
    for file, key, message in (
        ("speech_tokenizer_v2.onnx", "speech", r"makes 27 different tokens, and cosyvoice2\.yaml says .* 61"),
        ("campplus.onnx", "speaker", r"makes embeddings of 8, and cosyvoice2\.yaml says flow\.spk_embed_dim 24"),
    ):
        mixed = shutil.copytree(GOLDEN, tmp_path / key)
        shutil.copyfile(other / "official" / file, mixed / file)
        assert re.search(message, refused(capfd, mixed, "--from=official", f"--to={tmp_path / 'm'}"))
        assert not (tmp_path / "m").exists()


@pytest.mark.official
def test_a_full_disk_leaves_nothing(other, tmp_path, monkeypatch):
    def fail(directory, *rest):
        raise UserError(f"{directory}: cannot write (No space left on device); make room and give the same command")

    from cv2jax.jobs import import_official as job

    monkeypatch.setattr(job, "save_frugally", fail)
    with pytest.raises(UserError, match=rf"{tmp_path}/m/speech_tokenizer/checkpoints: cannot write \(No space"):
        job.import_official(other / "official", tmp_path / "m")
    assert os.listdir(tmp_path) == []
