"""Sizes of official models come out of YAML and tensors, go back as they came, and a contradiction names both sides."""

import dataclasses
import pathlib

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.official_sizes import (
    describe_sizes,
    differing_sizes,
    read_flow_sizes,
    read_hift_sizes,
    read_lm_sizes,
    streaming_chunk,
)
from cv2jax.convert.official_template import make_yaml
from cv2jax.convert.official_yaml import YamlSizes, read_yaml
from cv2jax.convert.qwen import read_backbone_config
from cv2jax.convert.weight_norm import FoldedReader
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from tests.convert.test_weight_norm import DictReader
from tests.models.golden_hift import GOLDEN_CONFIG, GOLDENS

GOLDEN = pathlib.Path(GOLDENS) / "official_model_tiny"
LM = TextSpeechLmConfig(backbone=read_backbone_config(GOLDEN / "CosyVoice-BlankEN"), num_speech_tokens=61)
FLOW = FlowMatchingConfig(
    num_speech_tokens=61,
    speaker_dim=24,
    encoder=FlowEncoderConfig(width=32, num_heads=4, mlp_dim=48, num_layers=2, num_upsampled_layers=2),
    estimator=EstimatorConfig(width=16, num_blocks=2, num_mid_stages=2, num_heads=2, head_dim=8),
    mask_chunks=(0, 5),
    mask_lefts=(-1, -1),
    mask_prompts=(0, 0),
    mask_per="batch",
    loss="mse",
    token_init="official",
)
READ = {"llm": read_lm_sizes, "flow": read_flow_sizes, "hift": read_hift_sizes}


def names(file):
    """Names and shapes of a golden state dict, kernels folded."""
    return dict(FoldedReader(DictReader(dict(np.load(GOLDENS / f"{file}_tiny_weights.npz")))).names())


def yaml_of(text, tmp_path):
    path = tmp_path / "cosyvoice2.yaml"
    path.write_text(text)
    return YamlSizes(read_yaml(path), path)


def read(file, yaml, tensors, backbone=LM.backbone):
    if file == "llm":
        return read_lm_sizes(yaml, "the yaml", backbone, "config.json", tensors)
    return READ[file](yaml, "the yaml", tensors)


def golden_yaml():
    return YamlSizes(read_yaml(GOLDEN / "cosyvoice2.yaml"), GOLDEN / "cosyvoice2.yaml")


def test_the_golden_is_read_and_described_as_it_is():
    yaml = golden_yaml()
    assert read("llm", yaml, names("llm")) == LM
    assert read("flow", yaml, names("flow")) == FLOW
    assert read("hift", yaml, names("hift")) == GOLDEN_CONFIG
    assert differing_sizes(yaml, describe_sizes(LM, FLOW, GOLDEN_CONFIG)) == []


def other_models():
    lm = TextSpeechLmConfig(
        backbone=Qwen2Config(vocabulary_size=400, width=24, mlp_dim=40, num_layers=3, num_heads=3, num_kv_heads=1),
        num_speech_tokens=27,
        mix_ratio=(3, 10),
    )
    flow = dataclasses.replace(
        FLOW,
        num_speech_tokens=27,
        num_mels=80,
        speaker_dim=10,
        encoder=FlowEncoderConfig(width=48, num_heads=3, mlp_dim=20, num_layers=1, num_upsampled_layers=4),
        estimator=EstimatorConfig(width=24, num_blocks=1, num_mid_stages=3, num_heads=3, head_dim=4),
        guidance=0.5,
        condition_dropout=0.1,
        sigma_min=3e-5,
        mask_chunks=(0, 30),
    )
    hift = HiftVocoderConfig(
        width=48, num_harmonics=5, block_kernels=(3, 5), source_kernels=(3, 5, 7), dilations=(1, 2)
    )
    return lm, flow, hift


def test_other_models_come_back_from_their_own_yaml(tmp_path):
    lm, flow, hift = other_models()
    yaml = yaml_of(make_yaml(describe_sizes(lm, flow, hift)), tmp_path)
    assert read("llm", yaml, {}, lm.backbone) == lm
    assert read("hift", yaml, {}) == hift
    shown = {
        f"encoder.up_encoders.{i}.x": ((1,), np.float32) for i in range(4)
    }  # the YAML leaves it to upstream's default
    assert "num_up_blocks" not in make_yaml(describe_sizes(lm, flow, hift))
    assert read("flow", yaml, shown) == flow
    assert differing_sizes(yaml, describe_sizes(lm, flow, hift)) == []
    lines = differing_sizes(yaml, describe_sizes(lm, FLOW, dataclasses.replace(hift, dilations=(1, 3))))
    assert "flow.spk_embed_dim: 10 there, 24 here" in lines
    assert "hift.resblock_dilation_sizes: [[1, 2], [1, 2]] there, [[1, 3], [1, 3]] here" in lines
    assert not any(line.startswith("llm") for line in lines)


def test_the_yaml_has_what_the_loader_reads(tmp_path):
    text = make_yaml(describe_sizes(TextSpeechLmConfig(), FlowMatchingConfig(), HiftVocoderConfig()))
    values = read_yaml(GOLDEN / "cosyvoice2.yaml")
    (tmp_path / "a.yaml").write_text(text)
    mine = read_yaml(tmp_path / "a.yaml")
    assert {"llm", "flow", "hift", "get_tokenizer", "feat_extractor", "allowed_special", "sample_rate"} <= set(mine)

    def shape(value):
        if hasattr(value, "tag"):
            return value.tag, shape(value.value)
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items() if key != "num_up_blocks"}
        return None

    def same_keys(one, other):
        if isinstance(one, tuple) and isinstance(other, tuple):
            assert one[0] == other[0]
            one, other = one[1], other[1]
        if isinstance(one, dict):
            assert set(one) == set(other)
            for key in one:
                same_keys(one[key], other[key])

    same_keys(shape(values), shape(mine))  # the golden was loaded by upstream's own classes


def test_a_new_yaml_of_official_sizes_has_official_numbers(tmp_path):
    flow = FlowMatchingConfig(mask_chunks=(0, 1, 25, 50), mask_lefts=(-1,) * 4, mask_prompts=(0,) * 4)
    yaml = yaml_of(make_yaml(describe_sizes(TextSpeechLmConfig(), flow, HiftVocoderConfig())), tmp_path)
    numbers = {
        "llm.llm_input_size": 896,
        "llm.speech_token_size": 6561,
        "flow.encoder.static_chunk_size": 25,
        "flow.decoder.estimator.static_chunk_size": 50,
        "flow.decoder.estimator.in_channels": 320,
        "flow.decoder.in_channels": 240,
        "hift.f0_predictor.cond_channels": 512,
        "feat_extractor.fmax": 8000,
    }
    assert {key: yaml.number(key) for key in numbers} == numbers


CONTRADICTIONS = [
    (
        "llm",
        {"speech_token_size: 61": "speech_token_size: 60"},
        r"llm\.speech_token_size \+ 3 is 63, but llm_decoder\.weight \(axis 0\) .* has 64",
    ),
    (
        "llm",
        {"llm_input_size: 32": "llm_input_size: 64"},
        r"llm\.llm_input_size is 64, but llm_embedding\.weight \(axis 1\) .* has 32",
    ),
    (
        "flow",
        {"spk_embed_dim: 24": "spk_embed_dim: 192"},
        r"flow\.spk_embed_dim is 192, but spk_embed_affine_layer\.weight \(axis 1\) .* has 24",
    ),
    (
        "flow",
        {"num_blocks: 2\n": "num_blocks: 6\n"},
        r"flow\.encoder\.num_blocks is 6, but encoder\.encoders\.N of flow\.pt has 2",
    ),
    (
        "flow",
        {"attention_head_dim: 8": "attention_head_dim: 4"},
        r"num_heads · attention_head_dim is 8, but .*to_q\.weight \(axis 0\) .* has 16",
    ),
    ("flow", {"channels: [16]": "channels: [16, 16]"}, r"channels is \[16, 16\]; only one level is supported"),
    (
        "flow",
        {"attention_heads: 4": "attention_heads: 3"},
        r"flow\.encoder\.attention_heads is 3, but .*pos_bias_u \(axis 0\) .* has 4",
    ),
    (
        "hift",
        {"nb_harmonics: 8": "nb_harmonics: 7"},
        r"hift\.nb_harmonics \+ 1 is 8, but m_source\.l_linear\.weight \(axis 1\) .* has 9",
    ),
    (
        "hift",
        {"base_channels: 32": "base_channels: 64"},
        r"hift\.base_channels is 64, but conv_pre\.weight \(axis 0\) .* has 32",
    ),
    (
        "hift",
        {"[16, 11, 7]": "[16, 9, 7]"},
        r"upsample_kernel_sizes\[1\] is 9, but ups\.1\.weight \(axis 2\) .* has 11",
    ),
    (
        "hift",
        {"source_resblock_dilation_sizes: [[1, 3, 5]": "source_resblock_dilation_sizes: [[1, 3, 7]"},
        "all blocks must have the same dilations",
    ),
    ("hift", {"hop_len: 4": "hop_len: 8"}, r"describes what cannot be built: .*istft_points=16: must be 4"),
    (
        "hift",
        {"upsample_rates: [8, 5, 3]": "upsample_rates: [-8, 5, -3]"},
        r"upsample_rates=\(-8, 5, -3\), .*all positive",
    ),
    (
        "hift",
        {"base_channels: 32": "base_channels: " + "3" * 400},
        r"base_channels is 333.*; it must be a smaller number",
    ),
    ("hift", {"    fmax: 8000\n": ""}, r"feat_extractor\.fmax is missing"),
]


@pytest.mark.parametrize(("file", "changes", "message"), CONTRADICTIONS)
def test_a_contradiction_names_both_sides(file, changes, message, tmp_path):
    text = (GOLDEN / "cosyvoice2.yaml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(UserError, match=f"yaml: .*{message}") as caught:
        read(file, yaml_of(text, tmp_path), names(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": 500}, r"vocab_size is 500, but .*embed_tokens\.weight \(axis 0\) .* has 512"),
        ({"num_layers": 3}, r"config\.json: num_hidden_layers is 3, but llm\.model\.model\.layers\.N of llm\.pt has 2"),
        ({"num_kv_heads": 1}, r"num_key_value_heads · head size is 8, but .*k_proj\.weight \(axis 0\) .* has 16"),
        ({"mlp_dim": 63}, r"config\.json: intermediate_size is 63, but .*gate_proj\.weight \(axis 0\) .* has 64"),
    ],
)
def test_the_backbone_config_is_held_against_the_tensors_too(change, message):
    with pytest.raises(UserError, match=message):
        read("llm", golden_yaml(), names("llm"), dataclasses.replace(LM.backbone, **change))


def test_all_contradictions_are_one_line(tmp_path):
    text = (GOLDEN / "cosyvoice2.yaml").read_text().replace("vocab_size: 61", "vocab_size: 6561")
    text = text.replace("linear_units: 48", "linear_units: 2048")
    with pytest.raises(UserError, match=r"linear_units is 2048.*; .*vocab_size is 6561.*; give files of one model"):
        read("flow", yaml_of(text, tmp_path), names("flow"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hift": {"f0_look_ahead": 2}}, "hift_vocoder: f0_look_ahead is 2, and must be 5"),
        ({"hift": {"max_magnitude": 50.0}}, "hift_vocoder: max_magnitude is 50, and must be 100"),
        (
            {"flow": {"estimator": EstimatorConfig(mlp_ratio=2)}},
            r"flow_matching: estimator\.mlp_ratio is 2, and must be 4",
        ),
        ({"flow": {"num_mels": 100}}, "hift_vocoder: num_mels is 80, and must be 100"),
    ],
)
def test_what_upstream_cannot_build_is_refused(change, message):
    flow = dataclasses.replace(FLOW, **change.get("flow", {}))
    hift = dataclasses.replace(GOLDEN_CONFIG, **change.get("hift", {}))
    with pytest.raises(UserError, match=rf"the official code cannot build this model \({message}\)"):
        describe_sizes(LM, flow, hift)


@pytest.mark.parametrize(
    ("chunks", "lefts", "want"),
    [((0, 1, 25, 50), (-1,) * 4, 25), ((0, 10, 20), (-1,) * 3, 20), ((0,), (-1,), 0), ((0, 25, 5), (-1, 100, -1), 5)],
)
def test_the_chunk_of_the_official_stream(chunks, lefts, want):
    config = FlowMatchingConfig(mask_chunks=chunks, mask_lefts=lefts, mask_prompts=(0,) * len(chunks))
    assert streaming_chunk(config) == want
