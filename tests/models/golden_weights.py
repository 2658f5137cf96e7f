"""Loads the tiny official tokenizer of `goldens/speech_tokenizer_tiny.npz` (torch names and layouts) into our tree."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "speech_tokenizer_tiny.npz"
NUM_HEADS = 2


def linear(w):
    return w.T


def split_heads(w):
    """[out, in] to [in, H, C]."""
    return w.T.reshape(w.shape[1], NUM_HEADS, -1)


def split_bias(b):
    return b.reshape(NUM_HEADS, -1)


def merge_heads(w):
    """[out, in] to [H, C, out]."""
    return w.T.reshape(NUM_HEADS, -1, w.shape[0])


def conv(w):
    """[out, in, k] to [k, in, out]."""
    return w.transpose(2, 1, 0)


def depthwise(w):
    """[D, 1, k] to [k, H, C]."""
    return w[:, 0].T.reshape(w.shape[2], NUM_HEADS, -1)


def same(a):
    return a


RULES = (
    (r"encoder\.(conv\d)\.weight", r"encoder/\1/kernel", conv),
    (r"encoder\.(conv\d)\.bias", r"encoder/\1/bias", same),
    (r"encoder\.blocks\.(\d+)\.attn\.(query|key|value)\.weight", r"@\1/attention/\2/kernel", split_heads),
    (r"encoder\.blocks\.(\d+)\.attn\.(query|value)\.bias", r"@\1/attention/\2/bias", split_bias),
    (r"encoder\.blocks\.(\d+)\.attn\.out\.weight", r"@\1/attention/out/kernel", merge_heads),
    (r"encoder\.blocks\.(\d+)\.attn\.out\.bias", r"@\1/attention/out/bias", same),
    (r"encoder\.blocks\.(\d+)\.attn\.fsmn_block\.weight", r"@\1/attention/fsmn/kernel", depthwise),
    (r"encoder\.blocks\.(\d+)\.attn_ln\.weight", r"@\1/attention_norm/scale", same),
    (r"encoder\.blocks\.(\d+)\.attn_ln\.bias", r"@\1/attention_norm/bias", same),
    (r"encoder\.blocks\.(\d+)\.mlp_ln\.weight", r"@\1/mlp_norm/scale", same),
    (r"encoder\.blocks\.(\d+)\.mlp_ln\.bias", r"@\1/mlp_norm/bias", same),
    (r"encoder\.blocks\.(\d+)\.mlp\.0\.weight", r"@\1/mlp/up/kernel", linear),
    (r"encoder\.blocks\.(\d+)\.mlp\.0\.bias", r"@\1/mlp/up/bias", same),
    (r"encoder\.blocks\.(\d+)\.mlp\.2\.weight", r"@\1/mlp/down/kernel", linear),
    (r"encoder\.blocks\.(\d+)\.mlp\.2\.bias", r"@\1/mlp/down/bias", same),
    (r"quantizer\._codebook\.project_down\.weight", r"quantizer/project_down/kernel", linear),
    (r"quantizer\._codebook\.project_down\.bias", r"quantizer/project_down/bias", same),
)


def convert(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Our path and array for one official tensor; exactly one rule must match."""
    matches = [(re.fullmatch(pattern, name), path, transform) for pattern, path, transform in RULES]
    ((match, path, transform),) = [m for m in matches if m[0]]
    return match.expand(path).replace("@", "encoder/stack/blocks_"), transform(value)


def load_golden() -> tuple[dict, dict[str, np.ndarray]]:
    """(parameters of Encoder1 and the quantizer, unrolled layout; the other arrays of the file)."""
    params, arrays = {}, {}
    with np.load(GOLDEN) as file:
        for name in file:
            if not name.startswith("w:"):
                arrays[name] = file[name]
                continue
            path, value = convert(name.removeprefix("w:"), file[name])
            *parents, leaf = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            assert leaf not in node, f"two tensors for {path}"
            node[leaf] = jnp.asarray(value)
    return params, arrays
