"""The tiny official language model of `goldens/llm_tiny_weights.npz` (torch names and layouts) in our tree."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import config_from_hf

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NUM_SPEECH_TOKENS = 61


def golden_config() -> TextSpeechLmConfig:
    values = json.loads((GOLDENS / "qwen_tiny_config.json").read_text())
    return TextSpeechLmConfig(backbone=config_from_hf(values, "golden"), num_speech_tokens=NUM_SPEECH_TOKENS)


def golden_params(config: TextSpeechLmConfig):
    """Scanned parameters, every tensor of the file used but the text head, which is the (tied) text embedding."""
    left = dict(np.load(GOLDENS / "llm_tiny_weights.npz"))
    c, prefix = config.backbone, "llm.model.model."

    def take(name):
        return left.pop(name)

    def layer(i):
        def attention(name, heads):
            at = f"{prefix}layers.{i}.self_attn.{name}_proj."
            kernel = take(at + "weight").T.reshape(c.width, heads, c.head_dim)
            return {"kernel": kernel, "bias": take(at + "bias").reshape(heads, c.head_dim)}

        out = take(f"{prefix}layers.{i}.self_attn.o_proj.weight").T.reshape(c.num_heads, c.head_dim, c.width)
        mlp = {
            name: {"kernel": take(f"{prefix}layers.{i}.mlp.{name}_proj.weight").T} for name in ("gate", "up", "down")
        }
        return {
            "attention": {
                "query": attention("q", c.num_heads),
                "key": attention("k", c.num_kv_heads),
                "value": attention("v", c.num_kv_heads),
                "out": {"kernel": out},
            },
            "attention_norm": {"scale": take(f"{prefix}layers.{i}.input_layernorm.weight")},
            "mlp_norm": {"scale": take(f"{prefix}layers.{i}.post_attention_layernorm.weight")},
            "mlp": mlp,
        }

    params = {
        "special_embedding": take("llm_embedding.weight"),
        "text_embedding": take(f"{prefix}embed_tokens.weight"),
        "speech_embedding": take("speech_embedding.weight"),
        "head_kernel": take("llm_decoder.weight").T,
        "head_bias": take("llm_decoder.bias"),
        "backbone": {
            **{f"blocks_{i}": layer(i) for i in range(c.num_layers)},
            "final_norm": {"scale": take(f"{prefix}norm.weight")},
        },
    }
    np.testing.assert_array_equal(take("llm.model.lm_head.weight"), params["text_embedding"])
    assert not left
    return _as_jax(params)


def _as_jax(tree):
    return {k: _as_jax(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}
