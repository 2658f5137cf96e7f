"""`cv2jax export --to official`: the golden comes back bit for bit, what was trained goes out exactly, nothing stale does."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import zipfile

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

from cv2jax.cli.main import run as run_cli
from cv2jax.config import LoraConfig, MeshConfig, TrainConfig, to_dict
from cv2jax.convert.official_yaml import YamlSizes, read_yaml
from cv2jax.convert.rules import foreign_tensors
from cv2jax.convert.weight_norm import NEW, OLD, fold
from cv2jax.jobs.official_checks import warn_of_differences
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.hift_vocoder.config import MEL_UNIT, HiftTrainingConfig
from cv2jax.models.hift_vocoder.model import init_params as init_hift
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.voice import Voice, load_voice, save_voice
from cv2jax.tasks.encoders import load_speaker_encoder, load_tokenizer
from cv2jax.tasks.trained import load_flow, load_params, text_speech_lm_config
from cv2jax.text.tokenizer import load_text_tokenizer
from cv2jax.train.lora import LORA, add_lora, save_lora
from cv2jax.train.run import load_run
from tests.jobs.test_import_official import FLOW, HIFT, small_lm
from tests.models.golden_hift import GOLDENS
from tests.official_directory import random_tree, same_tensors, write_directory
from tests.small_lm_run import make_run
from tests.small_model_directory import ENCODER, TOKENIZER, write_run
from tests.small_token_corpus import make_small_token_corpus

pytestmark = pytest.mark.official
torch = pytest.importorskip("torch")

GOLDEN = pathlib.Path(GOLDENS) / "official_model_tiny"
STAGES = ("text_speech_lm", "flow_matching", "hift_vocoder", "speech_tokenizer", "speaker_encoder")


def load(path):
    return torch.load(path, weights_only=True)


def export(*words):
    return run_cli(["export", *map(str, words)])


def import_directory(directory, model):
    assert run_cli(["import", str(directory), "--from=official", f"--to={model}"]) == 0
    return model


def files_in(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def entries_equal(one, other):
    return set(one) == set(other) and all(same_tensors(one[name], other[name]) == [] for name in one)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The golden directory with a zero-shot speaker and files of its own, and its model directory."""
    root = tmp_path_factory.mktemp("golden")
    official = shutil.copytree(GOLDEN, root / "official")
    speakers = load(GOLDEN / "spk2info.pt")
    speakers["b/女"] = zero_shot(np.random.default_rng(0))
    torch.save(speakers, official / "spk2info.pt")
    old = load(GOLDEN / "hift.pt")
    old = {f"generator.{n.replace(NEW[0], OLD[0]).replace(NEW[1], OLD[1])}": tensor for n, tensor in old.items()}
    torch.save(old, official / "hift.pt")
    (official / "vllm").mkdir()
    (official / "vllm" / "model.bin").write_text("of the language model")
    with zipfile.ZipFile(official / "flow.encoder.fp16.zip", "w") as archive:
        archive.writestr("code", "of the flow")
    shutil.copyfile(official / "campplus.onnx", official / "flow.decoder.estimator.fp32.onnx")  # of the flow too
    (official / "README.md").write_text("whatever")
    import_directory(official, root / "model")
    return root


def zero_shot(rng):
    """An entry as upstream's add_zero_shot_spk saves it, with a text that our tokenizer would write otherwise."""
    ids = torch.tensor([[104, 105, 32]], dtype=torch.int32)
    tokens = torch.from_numpy(rng.integers(0, 61, (1, 6)).astype(np.int32))
    mel = torch.from_numpy(rng.normal(size=(1, 12, 80)).astype(np.float32))
    embedding = torch.from_numpy(rng.normal(size=(1, 24)).astype(np.float32))
    count = lambda value: torch.tensor([value.shape[1]], dtype=torch.int32)  # noqa: E731
    return {
        "prompt_text": ids,
        "prompt_text_len": count(ids),
        "llm_prompt_speech_token": tokens,
        "llm_prompt_speech_token_len": count(tokens),
        "flow_prompt_speech_token": tokens,
        "flow_prompt_speech_token_len": count(tokens),
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": count(mel),
        "llm_embedding": embedding,
        "flow_embedding": embedding,
    }


def test_the_golden_comes_back_bit_for_bit(golden, tmp_path, capsys, caplog):
    assert export(golden / "model", "--to=official", f"--out={tmp_path / 'out'}") == 0
    assert re.search(r"out: official, \d+ files, 2 voices, 0\.290 M parameters", capsys.readouterr().out)
    before, after = golden / "official", tmp_path / "out"
    assert files_in(before) == files_in(after)
    for name in files_in(before):
        if name in ("llm.pt", "flow.pt", "hift.pt"):
            assert same_tensors(load(before / name), load(after / name)) == []
        elif name == "spk2info.pt":
            assert entries_equal(load(before / name), load(after / name))
            assert list(load(before / name)) == list(load(after / name))
        else:
            assert (before / name).read_bytes() == (after / name).read_bytes(), name
    llm = load(after / "llm.pt")
    warned = "its encoder has width 32 and 2 upsampled layers; the official code, as released, builds 512 and 4 only"
    assert warned in caplog.text
    head, table = llm["llm.model.lm_head.weight"], llm["llm.model.model.embed_tokens.weight"]
    assert head.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


def test_what_was_made_of_other_weights_is_left_out(golden, tmp_path, caplog):
    """A flow trained on: its own graph is written anew, other derived files are not there; changed voices are ours."""
    model = shutil.copytree(golden / "model", tmp_path / "model")
    _, params = load_flow(model / "flow_matching", make_mesh(MeshConfig(), jax.devices()[:1]))
    run = json.loads((model / "flow_matching" / "run.json").read_text())
    del run["facts"]["official"]
    tuned = write_run(tmp_path / "tuned", "flow_matching", run["facts"], (jax.tree.map(lambda a: a + 1, params), {}))
    run["config"]["task"] = "flow_matching"
    (tuned / "run.json").write_text(json.dumps({"config": run["config"], "facts": run["facts"]}))
    (model / "voices" / "spk0.safetensors").unlink()
    path = model / "voices" / "b%2F女.safetensors"
    save_voice(path, dataclasses.replace(load_voice(path), text="hi!"))
    (model / "hift_vocoder").rename(tmp_path / "hift")
    (model / "hift_vocoder").symlink_to(tmp_path / "hift")
    words = ("--to=official", f"--out={tmp_path / 'out'}", "--hift_names=weight_g", f"--flow_matching={tuned}")
    keep = model / "official" / "CosyVoice-BlankEN" / "model.safetensors"
    keep.write_bytes(keep.read_bytes()[:5000])
    assert export(model, *words) == 0
    assert f"{keep}: is damaged" in caplog.text
    assert len(safetensors.numpy.load_file(tmp_path / "out" / "CosyVoice-BlankEN" / "model.safetensors")) == 26
    gone = {"flow.encoder.fp16.zip"}
    assert files_in(tmp_path / "out") >= files_in(golden / "official") - gone - {
        "CosyVoice-BlankEN/generation_config.json"
    }
    assert "left out, since they were made of other weights: flow.encoder.fp16.zip" in caplog.text
    estimator = (tmp_path / "out" / "flow.decoder.estimator.fp32.onnx").read_bytes()
    assert b"estimator_out" in estimator
    before, after = load(GOLDEN / "flow.pt"), load(tmp_path / "out" / "flow.pt")
    assert set(before) == set(after)
    assert torch.equal(after["encoder_proj.bias"], before["encoder_proj.bias"] + 1)
    speakers = load(tmp_path / "out" / "spk2info.pt")
    assert list(speakers) == ["b/女"]
    ids = load_text_tokenizer(GOLDEN / "CosyVoice-BlankEN").encode("hi!")
    assert speakers["b/女"]["prompt_text"].tolist() == [ids]
    assert "embedding" in speakers["b/女"]
    names = {name.replace(NEW[0], OLD[0]).replace(NEW[1], OLD[1]) for name in load(GOLDEN / "hift.pt")}
    assert set(load(tmp_path / "out" / "hift.pt")) == names


def test_low_rank_factors_make_other_weights_too(golden, tmp_path, caplog):
    """The run is the import's own, and yet what was made of its weights is stale: of the language model, of nothing else."""
    run = golden / "model" / "text_speech_lm"
    config, mesh = text_speech_lm_config(load_run(run), run), make_mesh(MeshConfig(), jax.devices()[:1])
    params, _ = load_params(run, functools.partial(init_lm, config), mesh)
    lora = LoraConfig(rank=1, targets=("key",), also_trained=("head_bias",))
    key = jax.random.key(0)
    factors = nn.unbox(add_lora(init_lm(config, key), lora, key))[LORA]
    tuned = params | {"head_bias": params["head_bias"] + 1, LORA: factors}
    save_lora(tmp_path / "tuned.safetensors", tuned, lora)
    words = ("--to=official", f"--out={tmp_path / 'out'}", f"--lora={tmp_path / 'tuned.safetensors'}")
    assert export(golden / "model", *words) == 0
    assert files_in(golden / "official") - files_in(tmp_path / "out") == {"vllm/model.bin"}
    assert "left out, since they were made of other weights: vllm/model.bin" in caplog.text
    before, after = load(GOLDEN / "llm.pt"), load(tmp_path / "out" / "llm.pt")
    assert torch.equal(after["llm_decoder.bias"], before["llm_decoder.bias"] + 1)


def test_what_the_official_code_does_otherwise_is_told(caplog):
    flow = dataclasses.replace(FLOW, num_steps=4, temperature=0.5, mask_chunks=(0, 0))
    warn_of_differences(pathlib.Path("lm"), "speaker", pathlib.Path("flow"), flow)
    for line in (
        "flow: its encoder has width 16 and 1 upsampled layers",
        "lm: learnt its voices from names in front of the text; no official mode puts one there",
        "flow: was not trained for chunks",
        "flow: speaks at temperature 0.5; the official code at 1",
        "flow: solves in 4 steps; the official code in 10",
    ):
        assert line in caplog.text
    caplog.clear()
    warn_of_differences(pathlib.Path("lm"), "instruct", pathlib.Path("flow"), FlowMatchingConfig(mask_per="batch"))
    assert caplog.text == ""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_token_corpus(tmp_path_factory.mktemp("corpus") / "tokens", seed=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A model directory of runs that were never official: an average, low-rank factors, other units and origins."""
    root = tmp_path_factory.mktemp("trained")
    model = root / "model"
    sets = ("lora.rank=2", "optimizer.ema_decay=0.5", "model.backbone.scan_layers=False")
    make_run(model / "text_speech_lm", corpus, *sets)
    path = model / "text_speech_lm" / "run.json"  # its corpus names a tokenizer that never was
    run = json.loads(path.read_text())
    run["facts"]["speech_tokenizer"] = ""
    path.write_text(json.dumps(run))
    rng = np.random.default_rng(1)
    tree = lambda init, config: random_tree(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)), rng)  # noqa: E731
    flow, hift = tree(init_flow, FLOW), tree(init_hift, MOVED)
    write_stage(model, "flow_matching", FLOW, {"model": to_dict(FLOW)}, (flow, {}))
    mel = {"mel": to_dict(mel_definition())}
    facts = mel | {"model": to_dict(MOVED)}
    write_stage(model, "hift_vocoder", HiftTrainingConfig(generator=MOVED), facts, ({"generator": hift}, {}))
    tokenizer, speaker = dataclasses.replace(TOKENIZER, fsq_dim=3), dataclasses.replace(ENCODER, embedding_dim=8)
    source = write_directory(root / "other", small_lm(300), FLOW, HIFT, tokenizer, speaker, seed=7)
    import_directory(source, root / "imported")
    for stage in ("speech_tokenizer", "speaker_encoder"):
        (model / stage).symlink_to(root / "imported" / stage)
    return root, flow, hift


MOVED = dataclasses.replace(HIFT, mel_origin=-6.0, upsampling_unit=4.0)


def mel_definition():
    from cv2jax.audio.mel import FLOW_MEL

    return FLOW_MEL


def write_stage(model, task, config, facts, variables):
    write_run(model / task, task, facts, variables)
    described = {"config": to_dict(TrainConfig(name=task, task=task, model=config, num_steps=1)), "facts": facts}
    (model / task / "run.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    root = trained[0]
    voice = Voice(
        speaker_embedding=np.arange(8, dtype=np.float32),
        speech_tokens=np.arange(5, dtype=np.int32),
        mel=np.ones((10, 80), np.float32),
        text="one two",
        speech_tokenizer=load_tokenizer(root / "model" / "speech_tokenizer").hash,
        speaker_encoder=load_speaker_encoder(root / "model" / "speaker_encoder").hash,
    )
    save_voice(root / "model" / "voices" / "ann.safetensors", voice)
    out = tmp_path_factory.mktemp("exported") / "out"
    assert export(root / "model", "--to=official", f"--out={out}") == 0
    return out


def test_the_checklist_is_all_there(exported):
    assert files_in(exported) == {
        "llm.pt",
        "flow.pt",
        "hift.pt",
        "cosyvoice2.yaml",
        "campplus.onnx",
        "speech_tokenizer_v2.onnx",
        "flow.decoder.estimator.fp32.onnx",
        "spk2info.pt",
        *(
            f"CosyVoice-BlankEN/{name}"
            for name in (
                "config.json",
                "model.safetensors",
                "vocab.json",
                "merges.txt",
                "tokenizer_config.json",
                "tokenizer.json",
            )
        ),
    }
    config = json.loads((exported / "CosyVoice-BlankEN" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["hidden_size"] == 32
    for file in ("llm.pt", "flow.pt", "hift.pt"):
        assert {tensor.dtype for tensor in load(exported / file).values()} == {torch.float32}


def test_transformers_takes_the_backbone_and_llm_pt(exported):
    """As upstream does: the Qwen2 directory first, then llm.pt over it, strictly."""
    transformers = pytest.importorskip("transformers")
    place, theirs = exported / "CosyVoice-BlankEN", load(exported / "llm.pt")
    model = transformers.Qwen2ForCausalLM.from_pretrained(place)
    start = "llm.model."
    model.load_state_dict({n.removeprefix(start): t for n, t in theirs.items() if n.startswith(start)}, strict=True)
    assert torch.equal(model.lm_head.weight, theirs["llm.model.model.embed_tokens.weight"])
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(place), load_text_tokenizer(place)
    text = "one two<|endofprompt|> three [breath]"
    assert tokenizer.encode(text) == ours.encode(text)


def test_a_language_model_goes_out_averaged_and_merged(trained, exported):
    from cv2jax.convert.official import llm_rules

    run = trained[0] / "model" / "text_speech_lm"
    config = text_speech_lm_config(load_run(run), run)
    init = functools.partial(init_lm, config)
    params, _ = load_params(run, init, make_mesh(MeshConfig(), jax.devices()[:1]), ema=True)
    theirs = load(exported / "llm.pt")
    wanted = foreign_tensors(llm_rules(), params, "ours")
    assert set(theirs) == {*wanted, "llm.model.lm_head.weight"}
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(theirs[name].numpy(), tensor.read(), err_msg=name)
    plain, _ = load_params(run, init, make_mesh(MeshConfig(), jax.devices()[:1]), ema=False)
    query = theirs["llm.model.model.layers.1.self_attn.q_proj.weight"].numpy()
    assert not np.allclose(
        query, foreign_tensors(llm_rules(), plain, "o")["llm.model.model.layers.1.self_attn.q_proj.weight"].read()
    )


def test_the_units_and_the_origin_of_a_vocoder_are_undone(trained, exported):
    theirs, ours = load(exported / "hift.pt"), trained[2]["generator"]

    def kernel(name):
        return fold(*(theirs[f"{name}.{half}"].numpy() for half in NEW))

    np.testing.assert_allclose(kernel("ups.1"), ours["upsample_1"]["kernel"].transpose(1, 2, 0) / 4, rtol=1e-6)
    np.testing.assert_allclose(kernel("conv_pre"), ours["conv_in"]["kernel"].transpose(2, 1, 0) / MEL_UNIT, rtol=1e-6)
    moved = ours["conv_in"]["bias"] + 6 / MEL_UNIT * ours["conv_in"]["kernel"].sum((0, 1))
    np.testing.assert_allclose(theirs["conv_pre.bias"].numpy(), moved, atol=1e-4)


def test_a_new_yaml_describes_the_models(exported):
    yaml = YamlSizes(read_yaml(exported / "cosyvoice2.yaml"), exported / "cosyvoice2.yaml")
    assert yaml.integer("llm.speech_token_size") == 27
    assert yaml.integers("llm.mix_ratio") == (1, 3)
    assert yaml.integer("flow.spk_embed_dim") == 8
    assert yaml.integer("flow.encoder.static_chunk_size") == 25
    assert yaml.integer("hift.base_channels") == 16


def test_what_was_exported_is_imported_as_the_same_models(trained, exported, tmp_path):
    import_directory(exported, tmp_path / "again")
    assert export(tmp_path / "again", "--to=official", f"--out={tmp_path / 'out'}") == 0
    assert files_in(tmp_path / "out") == files_in(exported)
    for name in files_in(exported):
        if name.endswith(".pt") and name != "spk2info.pt":
            assert same_tensors(load(exported / name), load(tmp_path / "out" / name)) == []
        elif name != "spk2info.pt":
            assert (exported / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert entries_equal(load(exported / "spk2info.pt"), load(tmp_path / "out" / "spk2info.pt"))
    theirs = load_text_tokenizer(tmp_path / "again" / "text_speech_lm" / "text_tokenizer")
    assert theirs.hash == load_text_tokenizer(trained[0] / "model" / "text_speech_lm" / "text_tokenizer").hash
    voice = load_voice(tmp_path / "again" / "voices" / "ann.safetensors")
    assert (voice.text, voice.speech_tokens.tolist()) == ("one two", [0, 1, 2, 3, 4])


def test_runs_may_be_given_by_flags_alone(trained, exported, tmp_path):
    model = trained[0] / "model"
    flags = [f"--{stage}={model / stage}" for stage in STAGES]
    assert export(*flags, "--to=official", f"--out={tmp_path / 'out'}") == 0
    for name in ("llm.pt", "flow.pt", "hift.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes()
    assert "spk2info.pt" not in files_in(tmp_path / "out")


def spoil_facts(model, stage, change):
    """The stage as a directory of its own whose facts are changed."""
    path = (model / stage / "run.json").resolve()
    run = json.loads(path.read_text())
    change(run)
    new = model / f"new_{stage}"
    shutil.copytree(path.parent, new)
    (new / "run.json").write_text(json.dumps(run))
    (model / stage).unlink()
    new.rename(model / stage)


def look_less_ahead(run):
    run["facts"]["model"]["f0_look_ahead"] = 2


BAD = [
    (lambda m: (m / "flow_matching").unlink(), r"has no flow_matching; train it there .* or link a run"),
    (lambda m: (m / "speech_tokenizer").unlink(), r"has no speech_tokenizer; train it there"),
    (lambda m: spoil_facts(m, "flow_matching", lambda r: r["config"].update(task="x")), "is a run of x"),
    (lambda m: spoil_facts(m, "flow_matching", lambda r: r["facts"]["model"].update(num_speech_tokens=26)),
     r"reads 26 speech tokens, and .* makes 27; give runs on one speech tokenizer"),
    (lambda m: spoil_facts(m, "hift_vocoder", look_less_ahead), r"cannot build this model \(hift_vocoder: f0_look_ahead is 2"),
    (lambda m: spoil_facts(m, "text_speech_lm", lambda r: r["facts"].update(text_tokenizer="0" * 64)),
     "its hash .* differs from 000"),
    (lambda m: spoil_facts(m, "text_speech_lm", lambda r: r["facts"].update(speech_tokenizer="1" * 64)),
     "text_speech_lm: learnt from tokens of 111111111111, but the speech tokenizer is"),
    (lambda m: spoil_facts(m, "flow_matching", lambda r: r["facts"].update(speaker_embeddings={"encoder": "2" * 64})),
     "flow_matching: learnt from embeddings of speaker encoder 222222222222, but the directory's is"),
    (lambda m: (m / "official.json").write_text("{}"), r"official\.json: is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_model_that_will_not_do_is_one_line_and_leaves_nothing(spoil, message, trained, tmp_path, capfd):
    model = tmp_path / "model"
    model.mkdir()
    for stage in STAGES:
        (model / stage).symlink_to((trained[0] / "model" / stage).resolve())
    spoil(model)
    assert export(model, "--to=official", f"--out={tmp_path / 'out'}") == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax export: ")]
    assert re.search(message, line)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to=official", "--out={tmp}/o"), "--speech_tokenizer is missing; give its run, or the model directory"),
        (("{tmp}/no", "--to=official", "--out={tmp}/o"), "no: no such model directory"),
        (("{model}", "--to=official", "--out={tmp}"), "--out .*: exists already; give a new place"),
        (("{model}", "--to=official", "--out={tmp}/o", "--step=3"), "--step is not for --to official"),
        (("{model}", "--to=official", "--out={tmp}/o", "--noema"), "--ema is not for --to official"),
        (("{model}", "--to=official", "--out={tmp}/o", "--hift_names=x"), "choose parametrised or weight_g"),
        (("{model}", "--to=official", "--out={tmp}/o", "--flow_matching={model}/hift_vocoder"), "is a run of hift_vocoder"),
        (("{model}/flow_matching", "--to=official", "--out={tmp}/o"), "is a run of flow_matching, not a model directory"),
        (("{model}/text_speech_lm", "--to=qwen2", "--out={tmp}/o", "--flow_matching=x"), "is for --to official; leave"),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense(words, message, trained, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert export(*(word.format(tmp=tmp_path, model=trained[0] / "model") for word in words)) == 2
    assert re.search(message, capfd.readouterr().err)
    assert os.listdir(tmp_path) == ["file"]


def test_a_voice_of_another_model_and_poisoned_weights_write_nothing(trained, tmp_path, capfd):
    model = tmp_path / "model"
    model.mkdir()
    for stage in STAGES:
        (model / stage).symlink_to((trained[0] / "model" / stage).resolve())
    voice = Voice(
        speaker_embedding=np.ones(8, np.float32),
        speech_tokens=np.zeros(0, np.int32),
        mel=np.zeros((0, 80), np.float32),
        speaker_encoder="another",
    )
    save_voice(model / "voices" / "bob.safetensors", voice)
    assert export(model, "--to=official", f"--out={tmp_path / 'out'}") == 2
    assert "its speaker embedding are of speaker encoder another" in capfd.readouterr().err
    (model / "voices" / "bob.safetensors").unlink()
    (model / "flow_matching").unlink()
    bad = dict(trained[1])
    bad["encoder_out"] = bad["encoder_out"] | {"kernel": np.full_like(bad["encoder_out"]["kernel"], np.nan)}
    write_stage(model, "flow_matching", FLOW, {"model": to_dict(FLOW)}, (bad, {}))
    assert export(model, "--to=official", f"--out={tmp_path / 'out'}") == 2
    assert "flow.pt: encoder_proj.weight has values that are not finite; nothing was written" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["model"]
