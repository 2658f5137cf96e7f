"""Writes `campplus.onnx`: Kaldi features to a speaker embedding (spec/official.md 1.4, spec/frontends.md 2).

Layout and names are those of the official file: a batch norm right behind a convolution is folded into it.

The mean of a last segment that is not whole is where runtimes differ: the official file's AveragePool(ceil_mode=1,
count_include_pad=1) divides it by 100 in onnxruntime up to 1.28, which upstream pins, and by its frames from 1.29 on. Ours
means one thing in all of them: the time axis is padded with zeros to whole segments, so that a plain AveragePool divides
by the segment ("kernel"); "count" divides that by the pooled frames there are.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float, PyTree

from cv2jax.convert.campplus import campplus_rules
from cv2jax.convert.onnx_builder import GraphBuilder
from cv2jax.convert.rules import ForeignTensor, foreign_tensors
from cv2jax.models.speaker_encoder.config import HEAD_STRIDE, SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.layers import EPSILON

OPSET = 17
LIST_PATHS = {"layer1.": "layer1/layer1.", "layer2.": "layer2/layer2.", "shortcut.": "shortcut/shortcut."}


def folded_norms(block_layers: tuple[int, ...]) -> dict[str, str]:
    """The module of each convolution with a batch norm right behind it → the norm's, of `block_layers` dense layers a block."""
    norms = {"head.conv1": "head.bn1", "head.conv2": "head.bn2"}
    for layer in (1, 2):
        for place in (0, 1):
            block = f"head.layer{layer}.{place}."
            norms |= {f"{block}conv{number}": f"{block}bn{number}" for number in (1, 2)}
        norms[f"head.layer{layer}.0.shortcut.0"] = f"head.layer{layer}.0.shortcut.1"
    norms["xvector.tdnn.linear"] = "xvector.tdnn.nonlinear.batchnorm"
    for block, num_layers in enumerate(block_layers, 1):
        for layer in range(1, num_layers + 1):
            at = f"xvector.block{block}.tdnnd{layer}."
            norms[f"{at}linear1"] = f"{at}nonlinear2.batchnorm"
    norms[f"xvector.transit{len(block_layers)}.linear"] = "xvector.out_nonlinear.batchnorm"
    return norms


def conv_strides(module: str) -> tuple[int, ...]:
    """The strides of a convolution of CAM++, of two axes (frequency, time) in the head."""
    if not module.startswith("head."):
        return (2,) if module == "xvector.tdnn.linear" else (1,)
    halves = module == "head.conv2" or module.endswith((".0.conv1", ".0.shortcut.0"))
    return (2 if halves else 1, 1)


def write_campplus_onnx(path: str | os.PathLike[str], config: SpeakerEncoderConfig, params_and_norms: PyTree) -> None:
    """Writes the graph input [B, F, M] fp32 → output [B, E]: rows of one length, since the official graph has no other.

    Args:
      path: of the file, written whole or not at all. config: sizes, and the rule for a segment that is not whole.
      params_and_norms: {"encoder": parameters, "norms": statistics of the batch norms}.

    Raises: UserError as `write_onnx`.
    """
    # All at once: it is 28 MB, and fetched one by one each of its hundred shapes would be compiled.
    parts = jax.device_get({part: params_and_norms[part] for part in ("encoder", "norms")})
    g = GraphBuilder(_folded(foreign_tensors(campplus_rules(), parts, str(path)), config))
    x = _head(g, config)
    x = g.op("Relu", _conv(g, x, "xvector.tdnn.linear"), at="xvector/tdnn/nonlinear/relu")
    segments = _Segments.of(g, x, config)
    for block, (num_layers, dilation) in enumerate(zip(config.block_layers, config.dilations, strict=True), 1):
        for layer in range(1, num_layers + 1):
            x = _dense_layer(g, x, f"xvector.block{block}.tdnnd{layer}", dilation, segments, config)
        x = _norm(g, x, f"xvector.transit{block}.nonlinear.batchnorm")
        x = g.op("Relu", x, at=f"xvector/transit{block}/nonlinear/relu")
        x = _conv(g, x, f"xvector.transit{block}.linear")
    x = g.op("Relu", x, at="xvector/out_nonlinear/relu")
    _embedding(g, x, config)
    edge = ("input", "float32", ("B", "T", config.num_mels)), ("output", "float32", ("B", config.embedding_dim))
    g.save(path, "campplus", edge[:1], edge[1], OPSET)


def _folded(tensors: Mapping[str, ForeignTensor], config: SpeakerEncoderConfig) -> dict[str, ForeignTensor]:
    """The state dict with each norm of `folded_norms` in its convolution: `weight` scaled, and a `bias` that there was not."""
    folded = dict(tensors)
    for conv, norm in folded_norms(config.block_layers).items():
        kernel = folded[f"{conv}.weight"]
        parts = {name: folded.pop(f"{norm}.{name}") for name in ("weight", "bias", "running_mean", "running_var")}
        weight = functools.partial(_folded_weight, kernel, parts)
        folded[f"{conv}.weight"] = ForeignTensor(shape=kernel.shape, read=weight)
        bias = functools.partial(_folded_bias, parts)
        folded[f"{conv}.bias"] = ForeignTensor(shape=parts["bias"].shape, read=bias)
    return folded


def _gain(parts: Mapping[str, ForeignTensor]) -> Float[np.ndarray, " D"]:
    variance = parts["running_var"].read().astype(np.float64)
    return parts["weight"].read() / np.sqrt(variance + EPSILON)


def _folded_weight(kernel: ForeignTensor, parts: Mapping[str, ForeignTensor]) -> Float[np.ndarray, "D ..."]:
    gain = _gain(parts).reshape(-1, *(1 for _ in kernel.shape[1:]))
    return (kernel.read() * gain).astype(np.float32)


def _folded_bias(parts: Mapping[str, ForeignTensor]) -> Float[np.ndarray, " D"]:
    return (parts["bias"].read() - parts["running_mean"].read() * _gain(parts)).astype(np.float32)


def _path(module: str) -> str:
    """`head/layer1/layer1.0/conv1` of `head.layer1.0.conv1`: how torch spells lists."""
    path = module.replace(".", "/")
    for name, spelt in LIST_PATHS.items():
        path = path.replace(name.replace(".", "/"), spelt)
    return path


def _conv(g: GraphBuilder, x: str, module: str, dilation: int = 1) -> str:
    """The convolution of a module with all that its name and its kernel tell."""
    has_bias = f"{module}.bias" in g.weights
    is_folded = has_bias and ".cam_layer." not in module  # torch forgets the names of what it folds
    kernel = g.weight(f"{module}.weight", g.opaque("Conv") if is_folded else "")
    bias = g.weight(f"{module}.bias", g.opaque("Conv") if is_folded else "") if has_bias else None
    sizes = g.tensors[kernel].shape[2:]
    pads = [dilation * (size // 2) for size in sizes] * 2
    strides, dilations = conv_strides(module), (dilation,) * len(sizes)
    return g.conv(x, kernel, bias, at=_path(module), strides=strides, pads=pads, dilations=dilations)


def _norm(g: GraphBuilder, x: str, module: str) -> str:
    names = ("weight", "bias", "running_mean", "running_var")
    inputs = [g.weight(f"{module}.{name}") for name in names]
    return g.op("BatchNormalization", x, *inputs, at=_path(module), epsilon=EPSILON)


def _head(g: GraphBuilder, config: SpeakerEncoderConfig) -> str:
    """[B, F, M] → [B, channels · M / 8, F], channels before bands."""
    x = g.op("Unsqueeze", g.op("Transpose", "input", perm=(0, 2, 1)), g.ints(1), at="head")
    x = g.op("Relu", _conv(g, x, "head.conv1"), at="head")
    for layer in (1, 2):
        for place in (0, 1):
            module = f"head.layer{layer}.{place}"
            at = _path(module)
            h = g.op("Relu", _conv(g, x, f"{module}.conv1"), at=at)
            h = _conv(g, h, f"{module}.conv2")
            x = _conv(g, x, f"{module}.shortcut.0") if place == 0 else x
            x = g.op("Relu", g.op("Add", h, x, at=at), at=at)
    x = g.op("Relu", _conv(g, x, "head.conv2"), at="head")
    return g.op("Reshape", x, g.ints(0, config.head_channels * config.num_mels // HEAD_STRIDE, -1), at="head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
    """Edges that all context masks see: zeros to append, frames there are, and a segment's share of real frames [1, 1, S]."""

    pads: str
    num_frames: str
    share: str

    @classmethod
    def of(cls, g: GraphBuilder, x: str, config: SpeakerEncoderConfig) -> "_Segments":
        """For x [B, D, T]."""
        at, size = "xvector", config.segment_frames
        num_frames = g.op("Unsqueeze", g.size(x, 2, at), g.ints(0), at=at)
        missing = g.op("Mod", g.op("Neg", num_frames, at=at), g.ints(size), at=at)  # of the divisor's sign
        pads = g.op("Concat", g.ints(0, 0, 0, 0, 0), missing, at=at, axis=0)
        share = ""
        if config.partial_segment == "count":
            ones = g.op("Expand", g.constant([[[1.0]]]), g.op("Concat", g.ints(1, 1), num_frames, at=at, axis=0), at=at)
            share = _pool(g, g.op("Pad", ones, pads, at=at), at, config)
        return cls(pads=pads, num_frames=num_frames, share=share)


def _pool(g: GraphBuilder, x: str, at: str, config: SpeakerEncoderConfig) -> str:
    size = (config.segment_frames,)
    return g.op("AveragePool", x, at=at, kernel_shape=size, strides=size)


def _dense_layer(
    g: GraphBuilder, x: str, module: str, dilation: int, segments: _Segments, config: SpeakerEncoderConfig
) -> str:
    at, cam = _path(module), f"{module}.cam_layer"
    h = g.op("Relu", _norm(g, x, f"{module}.nonlinear1.batchnorm"), at=f"{at}/nonlinear1/relu")
    h = g.op("Relu", _conv(g, h, f"{module}.linear1"), at=f"{at}/nonlinear2/relu")
    y, at = _conv(g, h, f"{cam}.linear_local", dilation), _path(cam)
    means = _pool(g, g.op("Pad", h, segments.pads, at=at), at, config)
    means = g.op("Div", means, segments.share, at=at) if segments.share else means
    context = g.op("Add", g.op("ReduceMean", h, at=at, axes=(2,)), means, at=at)
    # A segment has one context, so that the layers on it see segments, not frames.
    gate = g.op("Relu", _conv(g, context, f"{cam}.linear1"), at=f"{at}/relu")
    gate = g.op("Sigmoid", _conv(g, gate, f"{cam}.linear2"), at=f"{at}/sigmoid")
    gate = g.op("Unsqueeze", gate, g.ints(3), at=at)
    gate = g.op("Expand", gate, g.ints(1, 1, 1, config.segment_frames), at=at)
    gate = g.slice(g.op("Reshape", gate, g.ints(0, 0, -1), at=at), 0, segments.num_frames, 2, at)
    block = at.split("/tdnnd")[0]
    return g.op("Concat", x, g.op("Mul", y, gate, at=at), at=block, axis=1)


def _embedding(g: GraphBuilder, x: str, config: SpeakerEncoderConfig) -> None:
    at = "xvector/stats"
    mean = g.op("ReduceMean", x, at=at, axes=(2,))
    square = g.op("Sub", x, mean, at=at)
    square = g.op("ReduceSum", g.op("Mul", square, square, at=at), g.ints(2), at=at)
    count = g.op("Sub", g.cast(g.size(x, 2, at), "float32", at), g.constant(1.0), at=at)
    count = g.op("Max", count, g.constant(1.0), at=at)
    deviation = g.op("Sqrt", g.op("Div", square, count, at=at), at=at)
    pooled = g.op("Concat", mean, deviation, at=at, axis=1)
    module = "xvector.dense.nonlinear.batchnorm"
    y = g.op("Squeeze", _conv(g, pooled, "xvector.dense.linear"), g.ints(2), at="xvector/dense")
    ones, zeros = g.constant(np.ones(config.embedding_dim)), g.constant(np.zeros(config.embedding_dim))
    running = [g.weight(f"{module}.{name}") for name in ("running_mean", "running_var")]
    g.op("BatchNormalization", y, ones, zeros, *running, at=_path(module), output="output", epsilon=EPSILON)
