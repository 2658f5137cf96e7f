"""Sizes of the official models: of cosyvoice2.yaml and config.json, held against the tensors, and back into their keys."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cv2jax.config import UserError
from cv2jax.convert.official_yaml import YamlSizes
from cv2jax.convert.rules import Shape
from cv2jax.models.flow_matching.config import (
    FRAMES_PER_TOKEN,
    EstimatorConfig,
    FlowEncoderConfig,
    FlowMatchingConfig,
)
from cv2jax.models.hift_vocoder.config import F0_LAYERS, HiftVocoderConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import HF_FIELDS, Qwen2Config
from cv2jax.models.text_speech_lm.sequence import MIX_RATIO, NUM_STOPS

OFFICIAL_CHUNK = 25  # tokens of a hop of the official stream
_MLP_RATIO = 4  # of the estimator's blocks, which the YAML does not say
_MAX_MAGNITUDE = 100.0  # of the vocoder, likewise
_CHUNK = "static_chunk_size"
Names = Mapping[str, tuple[Shape, Any]]


class _Tensors:
    """Sizes that a file's tensors show, and what a description says otherwise."""

    def __init__(self, file: str, names: Names, source: str) -> None:
        self._file, self._names, self._source = file, names, source
        self._said: list[str] = []

    def dim(self, name: str, axis: int) -> int | None:
        """A tensor's size along an axis; None where it is not there."""
        shape = self._names[name][0] if name in self._names else ()
        return shape[axis] if axis < len(shape) else None

    def count(self, prefix: str) -> int | None:
        """How many numbers follow a prefix in the names; None: no name has it."""
        found = {match[1] for name in self._names if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
        return len(found) or None

    def compare(self, key: str, said: int, found: int | None, where: str, source: str = "") -> None:
        """Notes where a key says another number than the tensors."""
        if found is not None and said != found:
            self._said.append(f"{source or self._source}: {key} is {said}, but {where} of {self._file} has {found}")

    def compare_axis(self, key: str, said: int, name: str, axis: int, source: str = "") -> None:
        """`compare` with a tensor's size along an axis."""
        self.compare(key, said, self.dim(name, axis), f"{name} (axis {axis})", source)

    def finish(self) -> None:
        """Raises UserError with all that was noted."""
        if self._said:
            raise UserError(f"{'; '.join(self._said)}; give files of one model")


def read_lm_sizes(
    yaml: YamlSizes, yaml_place: str, backbone: Qwen2Config, hf_place: str, names: Names
) -> TextSpeechLmConfig:
    """The language model's config of the YAML's `llm` and of CosyVoice-BlankEN's; UserError where llm.pt has other sizes."""
    found = _Tensors("llm.pt", names, yaml_place)
    rows = found.dim("llm_decoder.weight", 0)
    num_speech = yaml.integer("llm.speech_token_size", None if rows is None else rows - NUM_STOPS)
    found.compare_axis(f"llm.speech_token_size + {NUM_STOPS}", num_speech + NUM_STOPS, "llm_decoder.weight", 0)
    found.compare_axis(f"llm.speech_token_size + {NUM_STOPS}", num_speech + NUM_STOPS, "speech_embedding.weight", 0)
    for key, name in (("llm_input_size", "llm_embedding.weight"), ("llm_output_size", "llm_decoder.weight")):
        found.compare_axis(f"llm.{key}", yaml.integer(f"llm.{key}", backbone.width), name, 1)
    model, keys = "llm.model.model.", {ours: theirs for theirs, ours in HF_FIELDS.items()}
    layer = f"{model}layers.0."
    sizes = (
        ("vocabulary_size", backbone.vocabulary_size, f"{model}embed_tokens.weight", 0),
        ("width", backbone.width, f"{model}embed_tokens.weight", 1),
        ("mlp_dim", backbone.mlp_dim, f"{layer}mlp.gate_proj.weight", 0),
    )
    for field, said, name, axis in sizes:
        found.compare_axis(keys[field], said, name, axis, hf_place)
    kv = backbone.num_kv_heads * backbone.head_dim
    found.compare_axis("num_key_value_heads · head size", kv, f"{layer}self_attn.k_proj.weight", 0, hf_place)
    layers = found.count(f"{model}layers.")
    found.compare("num_hidden_layers", backbone.num_layers, layers, f"{model}layers.N", hf_place)
    found.finish()
    ratio = yaml.integers("llm.mix_ratio") if yaml.has("llm.mix_ratio") else MIX_RATIO
    if len(ratio) != 2:
        raise UserError(f"{yaml_place}: llm.mix_ratio is {list(ratio)}; it must be two numbers")
    config = TextSpeechLmConfig(
        backbone=backbone,
        num_speech_tokens=num_speech,
        mix_ratio=(ratio[0], ratio[1]),
        label_smoothing=float(yaml.number("llm.lsm_weight", 0.0)),
    )
    return _validated(config, yaml_place)


def read_flow_sizes(yaml: YamlSizes, place: str, names: Names) -> FlowMatchingConfig:
    """The flow's config of the YAML's `flow`; UserError where flow.pt has other sizes, and for what ours has not."""
    found = _Tensors("flow.pt", names, place)
    estimator, stage = "decoder.estimator.", "decoder.estimator.down_blocks.0."

    def size(key: str, name: str, axis: int) -> int:
        said = yaml.integer(f"flow.{key}", found.dim(name, axis))
        found.compare_axis(f"flow.{key}", said, name, axis)
        return said

    def count(key: str, prefix: str) -> int:
        said = yaml.integer(f"flow.{key}", found.count(prefix))
        found.compare(f"flow.{key}", said, found.count(prefix), f"{prefix}N")
        return said

    block = "encoder.encoders.0."
    encoder = FlowEncoderConfig(
        width=size("encoder.output_size", "input_embedding.weight", 1),
        num_heads=size("encoder.attention_heads", f"{block}self_attn.pos_bias_u", 0),
        mlp_dim=size("encoder.linear_units", f"{block}feed_forward.w_1.weight", 0),
        num_layers=count("encoder.num_blocks", "encoder.encoders."),
        num_upsampled_layers=count("encoder.num_up_blocks", "encoder.up_encoders."),
        dropout=float(yaml.number("flow.encoder.dropout_rate", 0.1)),
    )
    size("input_size", "input_embedding.weight", 1)
    channels = yaml.integers("flow.decoder.estimator.channels")
    if len(channels) != 1:
        raise UserError(f"{place}: flow.decoder.estimator.channels is {list(channels)}; only one level is supported")
    found.compare_axis("flow.decoder.estimator.channels", channels[0], f"{stage}0.block1.block.0.weight", 0)
    velocity = EstimatorConfig(
        width=channels[0],
        num_blocks=count("decoder.estimator.n_blocks", f"{stage}1."),
        num_mid_stages=count("decoder.estimator.num_mid_blocks", f"{estimator}mid_blocks."),
        num_heads=yaml.integer("flow.decoder.estimator.num_heads"),
        head_dim=yaml.integer("flow.decoder.estimator.attention_head_dim"),
    )
    inner = velocity.num_heads * velocity.head_dim
    found.compare_axis(
        "flow.decoder.estimator.num_heads · attention_head_dim", inner, f"{stage}1.0.attn1.to_q.weight", 0
    )
    sizes = {
        "num_speech_tokens": size("vocab_size", "input_embedding.weight", 0),
        "num_mels": size("output_size", "encoder_proj.weight", 0),
        "speaker_dim": size("spk_embed_dim", "spk_embed_affine_layer.weight", 1),
    }
    found.finish()
    solver = "flow.decoder.cfm_params.content."
    chunk = yaml.integer("flow.encoder.static_chunk_size", OFFICIAL_CHUNK)
    config = FlowMatchingConfig(
        **sizes,
        encoder=encoder,
        estimator=velocity,
        # As upstream trains: whole or in chunks, one coin a batch, squared error.
        mask_chunks=(0, chunk) if chunk > 0 else (0,),
        mask_lefts=(-1, -1) if chunk > 0 else (-1,),
        mask_prompts=(0, 0) if chunk > 0 else (0,),
        mask_per="batch",
        loss="mse",
        sigma_min=float(yaml.number(f"{solver}sigma_min", 1e-6)),
        condition_dropout=float(yaml.number(f"{solver}training_cfg_rate", 0.2)),
        guidance=float(yaml.number(f"{solver}inference_cfg_rate", 0.7)),
        token_init="official",
    )
    return _validated(config, place)


def read_hift_sizes(yaml: YamlSizes, place: str, names: Names) -> HiftVocoderConfig:
    """The vocoder's config of the YAML's `hift` and `feat_extractor`; UserError where hift.pt (folded) has other sizes."""
    found = _Tensors("hift.pt", names, place)

    def size(key: str, name: str, axis: int, plus: int = 0) -> int:
        there = found.dim(name, axis)
        said = yaml.integer(f"hift.{key}", None if there is None else there - plus)
        found.compare_axis(f"hift.{key}" + (f" + {plus}" if plus else ""), said + plus, name, axis)
        return said

    kernels = yaml.integers("hift.resblock_kernel_sizes")
    config = HiftVocoderConfig(
        num_mels=size("in_channels", "conv_pre.weight", 1),
        rate_hz=yaml.integer("hift.sampling_rate"),
        mel_fft=yaml.integer("feat_extractor.n_fft"),
        mel_hop=yaml.integer("feat_extractor.hop_size"),
        mel_fmax_hz=float(yaml.number("feat_extractor.fmax")),
        width=size("base_channels", "conv_pre.weight", 0),
        upsample_rates=yaml.integers("hift.upsample_rates"),
        upsample_kernels=yaml.integers("hift.upsample_kernel_sizes"),
        block_kernels=kernels,
        source_kernels=yaml.integers("hift.source_resblock_kernel_sizes"),
        dilations=_same_dilations(yaml, place),
        istft_points=size("istft_params.n_fft", "conv_post.weight", 0, 2),
        istft_hop=yaml.integer("hift.istft_params.hop_len"),
        num_harmonics=size("nb_harmonics", "m_source.l_linear.weight", 1, 1),
        sine_amplitude=float(yaml.number("hift.nsf_alpha", 0.1)),
        noise_amplitude=float(yaml.number("hift.nsf_sigma", 0.003)),
        voiced_above_hz=float(yaml.number("hift.nsf_voiced_threshold", 10)),
        max_amplitude=float(yaml.number("hift.audio_limit", 0.99)),
        f0_width=size("f0_predictor.cond_channels", "f0_predictor.condnet.0.weight", 0),
    )
    for stage, kernel in enumerate(config.upsample_kernels):
        found.compare_axis(f"hift.upsample_kernel_sizes[{stage}]", kernel, f"ups.{stage}.weight", 2)
    stages = found.count("ups.")
    found.compare("the length of hift.upsample_rates", len(config.upsample_rates), stages, "ups.N")
    blocks = found.count("resblocks.")
    number = len(kernels) * len(config.upsample_rates)
    found.compare("the number of kernels × stages of hift.resblock_kernel_sizes", number, blocks, "resblocks.N")
    found.finish()
    return _validated(config, place)


def _same_dilations(yaml: YamlSizes, place: str) -> tuple[int, ...]:
    both = ("hift.resblock_dilation_sizes", "hift.source_resblock_dilation_sizes")
    rows = {row for key in both for row in yaml.rows(key)}
    if len(rows) != 1:
        raise UserError(f"{place}: {' and '.join(both)} hold different rows; all blocks must have the same dilations")
    return rows.pop()


def _validated(config: Any, place: str) -> Any:
    parts = [config, *(v for f in dataclasses.fields(config) if hasattr(v := getattr(config, f.name), "validate"))]
    for part in parts:
        try:
            part.validate()
        except UserError as error:
            raise UserError(f"{place}: describes what cannot be built: {error}") from None
    return config


def streaming_chunk(config: FlowMatchingConfig) -> int:
    """Tokens of a chunk that the official stream shall use: 25 if the flow was trained so, else the longest; 0: none."""
    rows = zip(config.mask_chunks, config.mask_lefts, strict=True)
    trained = [chunk for chunk, left in rows if chunk > 0 and left < 0]
    return OFFICIAL_CHUNK if OFFICIAL_CHUNK in trained else max(trained, default=0)


def describe_sizes(lm: TextSpeechLmConfig, flow: FlowMatchingConfig, hift: HiftVocoderConfig) -> dict[str, Any]:
    """What cosyvoice2.yaml says of three models: key → number, list or list of lists.

    Raises UserError for models that the official code cannot be told to build.
    """
    _check_representable(flow, hift)
    encoder, estimator, chunk = flow.encoder, flow.estimator, streaming_chunk(flow)
    rows = [list(hift.dilations)]
    return {
        "sample_rate": hift.rate_hz,
        "llm.llm_input_size": lm.backbone.width,
        "llm.llm_output_size": lm.backbone.width,
        "llm.speech_token_size": lm.num_speech_tokens,
        "llm.mix_ratio": list(lm.mix_ratio),
        "flow.input_size": encoder.width,
        "flow.output_size": flow.num_mels,
        "flow.spk_embed_dim": flow.speaker_dim,
        "flow.vocab_size": flow.num_speech_tokens,
        "flow.encoder.input_size": encoder.width,
        "flow.encoder.output_size": encoder.width,
        "flow.encoder.attention_heads": encoder.num_heads,
        "flow.encoder.linear_units": encoder.mlp_dim,
        "flow.encoder.num_blocks": encoder.num_layers,
        "flow.encoder.num_up_blocks": encoder.num_upsampled_layers,
        "flow.encoder.static_chunk_size": chunk,
        "flow.decoder.in_channels": 3 * flow.num_mels,
        "flow.decoder.spk_emb_dim": flow.num_mels,
        "flow.decoder.cfm_params.content.sigma_min": flow.sigma_min,
        "flow.decoder.cfm_params.content.training_cfg_rate": flow.condition_dropout,
        "flow.decoder.cfm_params.content.inference_cfg_rate": flow.guidance,
        "flow.decoder.estimator.in_channels": 4 * flow.num_mels,
        "flow.decoder.estimator.out_channels": flow.num_mels,
        "flow.decoder.estimator.channels": [estimator.width],
        "flow.decoder.estimator.attention_head_dim": estimator.head_dim,
        "flow.decoder.estimator.n_blocks": estimator.num_blocks,
        "flow.decoder.estimator.num_mid_blocks": estimator.num_mid_stages,
        "flow.decoder.estimator.num_heads": estimator.num_heads,
        "flow.decoder.estimator.static_chunk_size": FRAMES_PER_TOKEN * chunk,
        "hift.in_channels": hift.num_mels,
        "hift.base_channels": hift.width,
        "hift.nb_harmonics": hift.num_harmonics,
        "hift.sampling_rate": hift.rate_hz,
        "hift.nsf_alpha": hift.sine_amplitude,
        "hift.nsf_sigma": hift.noise_amplitude,
        "hift.nsf_voiced_threshold": hift.voiced_above_hz,
        "hift.upsample_rates": list(hift.upsample_rates),
        "hift.upsample_kernel_sizes": list(hift.upsample_kernels),
        "hift.istft_params.n_fft": hift.istft_points,
        "hift.istft_params.hop_len": hift.istft_hop,
        "hift.resblock_kernel_sizes": list(hift.block_kernels),
        "hift.resblock_dilation_sizes": rows * len(hift.block_kernels),
        "hift.source_resblock_kernel_sizes": list(hift.source_kernels),
        "hift.source_resblock_dilation_sizes": rows * len(hift.source_kernels),
        "hift.audio_limit": hift.max_amplitude,
        "hift.f0_predictor.in_channels": hift.num_mels,
        "hift.f0_predictor.cond_channels": hift.f0_width,
        "feat_extractor.n_fft": hift.mel_fft,
        "feat_extractor.num_mels": hift.num_mels,
        "feat_extractor.sampling_rate": hift.rate_hz,
        "feat_extractor.hop_size": hift.mel_hop,
        "feat_extractor.win_size": hift.mel_fft,
        "feat_extractor.fmax": hift.mel_fmax_hz,
    }


def _check_representable(flow: FlowMatchingConfig, hift: HiftVocoderConfig) -> None:
    fixed = (
        ("flow_matching", "estimator.mlp_ratio", flow.estimator.mlp_ratio, _MLP_RATIO),
        ("hift_vocoder", "max_magnitude", hift.max_magnitude, _MAX_MAGNITUDE),
        ("hift_vocoder", "f0_look_ahead", hift.f0_look_ahead, F0_LAYERS),
        ("hift_vocoder", "num_mels", hift.num_mels, flow.num_mels),
    )
    wrong = [f"{task}: {name} is {value:g}, and must be {only:g}" for task, name, value, only in fixed if value != only]
    if wrong:
        raise UserError(f"the official code cannot build this model ({'; '.join(wrong)}); train one that it can")


def differing_sizes(yaml: YamlSizes, described: Mapping[str, Any]) -> list[str]:
    """What a YAML says otherwise than `describe_sizes`, a line each; a key that it leaves out has upstream's default."""
    return [f"{key}: {theirs} there, {ours} here" for key, theirs, ours in compare_sizes(yaml, described)]


def compare_sizes(yaml: YamlSizes, described: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """As `differing_sizes`: key, what the YAML says, what `describe_sizes` says."""
    found = []
    for key, value in described.items():
        if not yaml.has(key):
            continue
        if isinstance(value, list):
            theirs: Any = yaml.rows(key) if isinstance(value[0], list) else yaml.integers(key)
            same = _plain(theirs) == value
        else:
            theirs = yaml.number(key)
            same = theirs == value or (key.endswith(_CHUNK) and theirs <= 0 and not value)  # either is no chunks
        if not same:
            found.append((key, _plain(theirs), value))
    return found


def _plain(values: Any) -> Any:
    return [_plain(one) for one in values] if isinstance(values, Sequence) else values
