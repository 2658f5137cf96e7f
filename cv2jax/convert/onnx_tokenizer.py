"""Writes `speech_tokenizer_v2.onnx`: log-mel and its length to speech tokens (spec/official.md 1.4, spec/frontends.md 1).

Nodes and initialisers are called as in the official file, so that what reads that one (s3tokenizer, ours) reads this one.
"""

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cv2jax.config import UserError
from cv2jax.convert.onnx_builder import GraphBuilder
from cv2jax.convert.rules import foreign_tensors
from cv2jax.convert.speech_tokenizer import speech_tokenizer_rules
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.fsq import BOUND, LEVELS
from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS
from cv2jax.nn.rope import rope_angles

OPSET = 17  # the first with layer norms
_MASKED = -1e10  # an attention score of a key that is not there
# How torch numbered the tensors whose names it lost: by block from _FIRST, and in each block so.
_FIRST, _PER_BLOCK, _PROJECTION = 2224, 52, 2536
_NUMBERS = {"query": (4, 3), "key": (6, None), "value": (9, 8), "out": (43, 42), "mlp.0": (48, 47), "mlp.2": (51, 50)}
_NORM_NUMBERS = {"attn_ln": 0, "mlp_ln": 44}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shared:
    """Edges that all blocks see: cosines and sines [L, 1, C], the valid positions [B, L, 1] and keys [B, 1, 1, L]."""

    cosine: str
    sine: str
    positions: str
    keys: str


def write_speech_tokenizer_onnx(path: str | os.PathLike[str], config: SpeechTokenizerConfig, params: PyTree) -> None:
    """Writes the graph feats [B, M, F] fp32, feats_length [B] int32 → indices [B, ceil(F / 4)] int32, 0 past the end.

    The same graph serves as `speech_tokenizer_v2.batch.onnx`: rows may be padded with anything.

    Args:
      path: of the file, written whole or not at all. config, params: of the tokenizer; only the ENCODING_PARTS are read.

    Raises: UserError for a quantizer other than fsq, which the official runtime cannot use, and as `write_onnx`.
    """
    if config.quantizer != "fsq":
        raise UserError(f"{path}: quantizer {config.quantizer!r} has no official form; train with model.quantizer=fsq")
    parts = {part: params[part] for part in ENCODING_PARTS}
    g = GraphBuilder(foreign_tensors(speech_tokenizer_rules(), parts, str(path)))
    x, lengths, shared = _front(g, config)
    for layer in range(config.num_layers):
        x = _block(g, config, x, layer, shared)
    _quantizer(g, config, x, lengths)
    inputs = [("feats", "float32", ("B", config.num_mels, "T")), ("feats_length", "int32", ("B",))]
    indices = ("indices", "int32", ("B", "L"))
    notes = {"rope_theta": repr(float(config.rope_theta))}
    g.save(path, "speech_tokenizer_v2", inputs, indices, OPSET, **notes)


def _front(g: GraphBuilder, config: SpeechTokenizerConfig) -> tuple[str, str, _Shared]:
    """(the hidden vectors [B, L, D] in front of the blocks, the valid positions [B, L], what the blocks share)."""
    x, lengths = "feats", g.cast("feats_length", "int64")
    for index, name in enumerate(("conv1", "conv2")):
        channels_first = g.op("Unsqueeze", _valid(g, lengths, g.size(x, 2)), g.ints(1))
        x = g.op("Where", channels_first, x, g.constant(0.0))
        number = 2 * index + 2216
        kernel = g.weight(f"encoder.{name}.weight", f"onnx::Conv_{number}")
        bias = g.weight(f"encoder.{name}.bias", f"onnx::Conv_{number + 1}")
        x = g.gelu(g.conv(x, kernel, bias, at=name, strides=(2,), pads=(1, 1)), "")
        half = g.op("Add", lengths, g.constant(1, "int64"))
        lengths = g.op("Div", half, g.constant(2, "int64"))
    num_positions = g.size(x, 2)
    valid = _valid(g, lengths, num_positions)
    head_dim = config.width // config.num_heads
    # The frequencies to the last bit as the model has them: an angle grows with the position, and its error too.
    frequencies = np.asarray(rope_angles(jnp.ones((1,), jnp.int32), head_dim, config.rope_theta))[0]
    positions = g.op("Unsqueeze", g.cast(g.positions(num_positions), "float32"), g.ints(1, 2))
    angles = g.op("Mul", positions, g.constant(np.concatenate([frequencies, frequencies])))
    shared = _Shared(
        cosine=g.op("Cos", angles),
        sine=g.op("Sin", angles),
        positions=g.op("Unsqueeze", valid, g.ints(2)),
        keys=g.op("Unsqueeze", valid, g.ints(1, 2)),
    )
    return g.op("Transpose", x, perm=(0, 2, 1)), valid, shared


def _valid(g: GraphBuilder, lengths: str, size: str) -> str:
    """[B, size], True before the end of each row."""
    return g.op("Less", g.op("Unsqueeze", g.positions(size), g.ints(0)), g.op("Unsqueeze", lengths, g.ints(1)))


def _linear(g: GraphBuilder, x: str, layer: int, module: str, at: str) -> str:
    kernel, bias = _NUMBERS[module.removeprefix("attn.")]
    first = _FIRST + _PER_BLOCK * layer
    names = {"name": f"onnx::MatMul_{first + kernel}", "bias": None if bias is None else f"onnx::Add_{first + bias}"}
    return g.linear(x, f"encoder.blocks.{layer}.{module}", at, **names)


def _norm(g: GraphBuilder, x: str, layer: int, module: str) -> str:
    number = _FIRST + _PER_BLOCK * layer + _NORM_NUMBERS[module]
    names = (f"onnx::LayerNormalization_{number}", f"onnx::LayerNormalization_{number + 1}")
    return g.layer_norm(x, f"encoder.blocks.{layer}.{module}", f"blocks.{layer}/{module}", names=names)


def _block(g: GraphBuilder, config: SpeechTokenizerConfig, x: str, layer: int, shared: _Shared) -> str:
    at = f"blocks.{layer}"
    h = _attention(g, config, _norm(g, x, layer, "attn_ln"), layer, shared)
    x = g.op("Add", x, h, at=at)
    h = _linear(g, _norm(g, x, layer, "mlp_ln"), layer, "mlp.0", f"{at}/mlp/mlp.0")
    h = _linear(g, g.gelu(h, f"{at}/mlp/mlp.1"), layer, "mlp.2", f"{at}/mlp/mlp.2")
    return g.op("Add", x, h, at=at)


def _attention(g: GraphBuilder, config: SpeechTokenizerConfig, x: str, layer: int, shared: _Shared) -> str:
    at = f"blocks.{layer}/attn"
    head_dim = config.width // config.num_heads
    q, k, v = (_linear(g, x, layer, f"attn.{name}", f"{at}/{name}") for name in ("query", "key", "value"))
    kept = g.op("Where", shared.positions, v, g.constant(0.0), at=at)
    split = g.ints(0, 0, config.num_heads, head_dim)
    q, k, v = (g.op("Reshape", a, split, at=at) for a in (q, k, v))
    q = g.op("Mul", _rotate(g, q, head_dim, shared, at), g.constant(head_dim**-0.5), at=at)
    q = g.op("Transpose", q, at=at, perm=(0, 2, 1, 3))
    k = g.op("Transpose", _rotate(g, k, head_dim, shared, at), at=at, perm=(0, 2, 3, 1))
    scores = g.op("Where", shared.keys, g.op("MatMul", q, k, at=at), g.constant(_MASKED), at=at)
    y = g.op("MatMul", g.op("Softmax", scores, at=at, axis=-1), g.op("Transpose", v, at=at, perm=(0, 2, 1, 3)), at=at)
    y = g.op("Reshape", g.op("Transpose", y, at=at, perm=(0, 2, 1, 3)), g.ints(0, 0, config.width), at=at)
    y = _linear(g, y, layer, "attn.out", f"{at}/out")
    return g.op("Add", y, _memory(g, config, kept, layer, shared), at=at)


def _rotate(g: GraphBuilder, x: str, head_dim: int, shared: _Shared, at: str) -> str:
    """x [B, L, H, C] turned by its position: halves, not neighbours, are the pairs."""
    first, second = (g.slice(x, start, start + head_dim // 2, 3, at) for start in (0, head_dim // 2))
    turned = g.op("Concat", g.op("Neg", second, at=at), first, at=at, axis=3)
    return g.op("Add", g.op("Mul", x, shared.cosine, at=at), g.op("Mul", turned, shared.sine, at=at), at=at)


def _memory(g: GraphBuilder, config: SpeechTokenizerConfig, kept: str, layer: int, shared: _Shared) -> str:
    """FSMN over the values [B, L, D], 0 where they do not count."""
    at, padding = f"blocks.{layer}/attn", config.fsmn_kernel // 2
    module = f"blocks.{layer}.attn.fsmn_block.weight"
    kernel = g.weight(f"encoder.{module}", module)
    turned = g.op("Transpose", kept, at=at, perm=(0, 2, 1))
    y = g.conv(turned, kernel, at=f"{at}/fsmn_block", pads=(padding, padding), group=config.width)
    y = g.op("Add", g.op("Transpose", y, at=at, perm=(0, 2, 1)), kept, at=at)
    return g.op("Where", shared.positions, y, g.constant(0.0), at=at)


def _quantizer(g: GraphBuilder, config: SpeechTokenizerConfig, x: str, valid: str) -> None:
    at, theirs = "quantizer", "quantizer._codebook.project_down"
    names = {"name": f"onnx::MatMul_{_PROJECTION}", "bias": "quantizer.project_in.bias"}
    z = g.linear(x, theirs, f"{at}/project_in", **names)
    digits = g.op("Round", g.op("Mul", g.op("Tanh", z, at=at), g.constant(BOUND), at=at), at=at)
    digits = g.cast(g.op("Add", digits, g.constant(1.0), at=at), "int64", at)
    basis = g.constant([LEVELS**i for i in range(config.fsq_dim)], "int64")
    ids = g.op("ReduceSum", g.op("Mul", digits, basis, at=at), g.ints(2), at=at, keepdims=0)
    ids = g.op("Where", valid, ids, g.constant(0, "int64"), at=at)
    g.cast(ids, "int32", output="indices")
