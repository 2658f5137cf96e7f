"""A new `cosyvoice2.yaml` for the official loader: upstream's classes with the sizes of ours (spec/official.md 1.1)."""

from collections.abc import Mapping
from typing import Any

from cv2jax.convert.official_yaml import Tagged

# What each part of the tree is made of upstream. What no size of ours says has upstream's value.
_CLASSES = {
    "llm": "!new:cosyvoice.llm.llm.Qwen2LM",
    "llm.llm": "!new:cosyvoice.llm.llm.Qwen2Encoder",
    "llm.sampling": "!name:cosyvoice.utils.common.ras_sampling",
    "flow": "!new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec",
    "flow.encoder": "!new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder",
    "flow.decoder": "!new:cosyvoice.flow.flow_matching.CausalConditionalCFM",
    "flow.decoder.cfm_params": "!new:omegaconf.DictConfig",
    "flow.decoder.estimator": "!new:cosyvoice.flow.decoder.CausalConditionalDecoder",
    "hift": "!new:cosyvoice.hifigan.generator.HiFTGenerator",
    "hift.f0_predictor": "!new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
    "get_tokenizer": "!name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer",
    "feat_extractor": "!name:matcha.utils.audio.mel_spectrogram",
}
# Not every release of upstream's encoder has this argument; each has the layers that it defaults to.
_DEFAULTS = {"flow.encoder.num_up_blocks": 4}
_QWEN = Tagged("!ref", "<qwen_pretrain_path>")
FIXED: dict[str, Any] = {
    "sample_rate": 0,  # a place: sizes fill it
    "qwen_pretrain_path": "",  # the loader gives it
    "llm.length_normalized_loss": True,
    "llm.lsm_weight": 0,
    "llm.llm.pretrain_path": _QWEN,
    "llm.sampling.top_p": 0.8,
    "llm.sampling.top_k": 25,
    "llm.sampling.win_size": 10,
    "llm.sampling.tau_r": 0.1,
    "flow.output_type": "mel",
    "flow.input_frame_rate": 25,
    "flow.only_mask_loss": True,
    "flow.token_mel_ratio": 2,
    "flow.pre_lookahead_len": 3,
    "flow.encoder.dropout_rate": 0.1,
    "flow.encoder.positional_dropout_rate": 0.1,
    "flow.encoder.attention_dropout_rate": 0.1,
    "flow.encoder.normalize_before": True,
    "flow.encoder.input_layer": "linear",
    "flow.encoder.pos_enc_layer_type": "rel_pos_espnet",
    "flow.encoder.selfattention_layer_type": "rel_selfattn",
    "flow.encoder.use_cnn_module": False,
    "flow.encoder.macaron_style": False,
    "flow.decoder.n_spks": 1,
    "flow.decoder.cfm_params.content.solver": "euler",
    "flow.decoder.cfm_params.content.t_scheduler": "cosine",
    "flow.decoder.cfm_params.content.reg_loss_type": "l1",
    "flow.decoder.estimator.dropout": 0.0,
    "flow.decoder.estimator.act_fn": "gelu",
    "flow.decoder.estimator.num_decoding_left_chunks": -1,
    "hift.lrelu_slope": 0.1,
    "hift.f0_predictor.num_class": 1,
    "get_tokenizer.token_path": _QWEN,
    "get_tokenizer.skip_special_tokens": True,
    "allowed_special": "all",
    "feat_extractor.fmin": 0,
    "feat_extractor.center": False,
}


def make_yaml(sizes: Mapping[str, Any]) -> str:
    """The text of a cosyvoice2.yaml with the sizes of `describe_sizes`."""
    tree: dict[str, Any] = {}
    for key, value in (FIXED | dict(sizes)).items():
        if _DEFAULTS.get(key) == value:
            continue
        *path, last = key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return "\n".join(_lines(tree, "", 0)) + "\n"


def _lines(tree: Mapping[str, Any], prefix: str, depth: int) -> list[str]:
    lines = []
    for name, value in tree.items():
        head = f"{'    ' * depth}{name}:"
        if isinstance(value, dict):
            tag = _CLASSES.get(prefix + name)
            lines += [f"{head} {tag}" if tag else head, *_lines(value, f"{prefix}{name}.", depth + 1)]
        else:
            lines.append(f"{head} {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, Tagged):
        return f"{value.tag} {value.value}"
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}" if value < 1 else f"{int(value)}"
    if isinstance(value, float) and "e" in (text := repr(value)) and "." not in text:
        return text.replace("e", ".0e")  # else YAML 1.1 reads a text
    return str(value)
