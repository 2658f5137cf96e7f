"""What `cosyvoice2.yaml` says beside sizes: the parts that its loader reads, and what ours computes in one way only."""

from typing import Any

from cv2jax.config import UserError
from cv2jax.convert.official_sizes import compare_sizes, describe_sizes
from cv2jax.convert.official_template import FIXED
from cv2jax.convert.official_yaml import YamlSizes, show_value
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig

# The keys that upstream's loader reads (spec/official.md 1.1): those with keys of their own, and the others.
_TABLES = ("llm", "flow", "flow.encoder", "flow.decoder", "flow.decoder.estimator", "hift", "hift.f0_predictor")
_PARTS = (*_TABLES, "get_tokenizer", "feat_extractor")
_VALUES = ("allowed_special", "sample_rate")
# Upstream's own front end has no defaults for these.
_FEATURES = ("n_fft", "num_mels", "sampling_rate", "hop_size", "win_size", "fmin", "fmax")
# Of what a new YAML says, these are not of the model's function: upstream never reads them, or in its training, its
# sampling and its tokenizer's decoding alone.
_FREE = (
    "sample_rate",
    "qwen_pretrain_path",
    "llm.",
    "get_tokenizer.",
    "allowed_special",
    "flow.output_type",
    "flow.only_mask_loss",
    "flow.encoder.dropout_rate",
    "flow.encoder.positional_dropout_rate",
    "flow.encoder.attention_dropout_rate",
    "flow.decoder.estimator.dropout",
    "flow.decoder.cfm_params.content.reg_loss_type",
)


def require_parts(yaml: YamlSizes, place: str) -> None:
    """Raises UserError for a file that lacks what the official loader reads, as one that is cut short does."""
    missing = [key for key in _PARTS if not yaml.has(key)] + [key for key in _VALUES if not yaml.has(key)]
    if missing:
        raise UserError(f"{place}: has no {', '.join(missing)}; is it cut short? copy it again")
    for key in _PARTS:
        if not yaml.has_table(key):
            raise UserError(
                f"{place}: {key} is {show_value(yaml.plain(key))}; it must be a table of keys; copy it again"
            )
    lacking = [f"feat_extractor.{name}" for name in _FEATURES if not yaml.has(f"feat_extractor.{name}")]
    if lacking:
        raise UserError(f"{place}: has no {', '.join(lacking)}; is it cut short? copy it again")


def require_settings(
    yaml: YamlSizes, place: str, lm: TextSpeechLmConfig, flow: FlowMatchingConfig, hift: HiftVocoderConfig
) -> None:
    """Raises UserError for settings that change what is computed and that ours has not; what the file leaves out is upstream's.

    Args: the models are those that the file's own sizes make: a key that says something else contradicts the others.
    """
    for key, only in FIXED.items():
        if key.startswith(_FREE) or not yaml.has(key):
            continue
        is_number = isinstance(only, int | float) and not isinstance(only, bool)
        theirs: Any = yaml.number(key) if is_number else yaml.plain(key)
        if theirs != only or isinstance(theirs, bool) != isinstance(only, bool):
            raise UserError(f"{place}: {key} is {show_value(theirs)}; only {show_value(only)} is supported")
    for key, theirs, ours in compare_sizes(yaml, describe_sizes(lm, flow, hift)):
        raise UserError(
            f"{place}: {key} is {theirs}, and with the file's other sizes only {ours} is supported; give files of one model"
        )
