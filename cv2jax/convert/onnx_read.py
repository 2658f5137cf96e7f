"""Reads `speech_tokenizer_v2.onnx` and `campplus.onnx` into our parameters (spec/frontends.md 1.5, 2.4).

Sizes come from the graph. What is read is what the official files are known to hold; any other graph is an `UnknownGraph`.
"""

import functools
import math
import os
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from cv2jax.config import UserError
from cv2jax.convert.campplus import campplus_rules
from cv2jax.convert.onnx_campplus import conv_strides, folded_norms
from cv2jax.convert.onnx_file import OnnxFile
from cv2jax.convert.onnx_modules import OnnxModules, OnnxReader, Parameter
from cv2jax.convert.rules import ForeignTensor, foreign_tensors
from cv2jax.convert.speech_tokenizer import speech_tokenizer_rules
from cv2jax.models.speaker_encoder.campplus import CamPlus
from cv2jax.models.speaker_encoder.config import HEAD_STRIDE, SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.layers import EPSILON
from cv2jax.models.speaker_encoder.model import MIN_FRAMES
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.fsq import BOUND
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params

_TOKENIZER_ROOTS, _CAMPPLUS_ROOTS = r"conv\d|blocks(\.\d+)?|quantizer|project_down", "head|xvector"
# Of the official file, of the state dict, of an export of s3tokenizer's module.
_PROJECTIONS = ("quantizer.project_in", "quantizer._codebook.project_down", "project_down")
_HEAD_DIM = 64  # of every released tokenizer


def read_speech_tokenizer_onnx(path: str | os.PathLike[str]) -> tuple[SpeechTokenizerConfig, OnnxReader]:
    """(sizes of Encoder1 and FSQ, the tensors under the names of `speech_tokenizer_rules`), read when they are asked for.

    `load_tree(speech_tokenizer_rules(), reader, abstract)` makes parameters of them. What the graph does not tell of the
    config, the recognition half, has its default.

    Raises: UnknownGraph for another structure, UserError for a file that is missing or damaged.
    """
    m = OnnxModules(OnnxFile(path), _TOKENIZER_ROOTS)
    projections = [name for name in _PROJECTIONS if m.parameters.get(f"{name}.weight")]
    if len(projections) != 1 or not m.find("Tanh"):
        raise m.unknown("no projection of finite scalar quantisation")
    config = _tokenizer_config(m, projections[0])
    for module in ("conv1", "conv2"):
        _check_conv(m, module, strides=(2,), pads=(1, 1))
    for layer in range(config.num_layers):
        _check_conv(m, f"blocks.{layer}.attn.fsmn_block", group=config.width)
    _check_epsilon(m, "LayerNormalization")
    _check_bound(m)

    def find(theirs: str) -> str:
        theirs = theirs.replace(_PROJECTIONS[1], projections[0])
        return theirs.removeprefix("encoder.")

    abstract = nn.unbox(jax.eval_shape(functools.partial(init_encoding_params, config), jax.random.key(0)))
    return config, m.reader(foreign_tensors(speech_tokenizer_rules(), abstract, m.place), find)


def _tokenizer_config(m: OnnxModules, projection: str) -> SpeechTokenizerConfig:
    width, num_mels, _ = m.shape("conv1.weight", 3)
    hidden, _ = m.shape("blocks.0.mlp.0.weight", 2)
    if hidden % width:
        raise m.unknown(f"an MLP of {hidden}, no multiple of {width}")
    config = SpeechTokenizerConfig(
        width=width,
        num_heads=_num_heads(m, width),
        num_layers=m.count("blocks.{}.attn.query.weight"),
        mlp_ratio=hidden // width,
        num_mels=num_mels,
        max_freq_bins=min(SpeechTokenizerConfig().max_freq_bins, num_mels),
        fsmn_kernel=m.shape("blocks.0.attn.fsmn_block.weight", 3)[2],
        rope_theta=float(m.notes.get("rope_theta", SpeechTokenizerConfig().rope_theta)),
        fsq_dim=m.shape(f"{projection}.weight", 2)[0],
        quantizer="fsq",
    )
    try:
        config.validate()
    except UserError as error:
        raise m.unknown(str(error)) from error
    return config


def _num_heads(m: OnnxModules, width: int) -> int:
    """Of the reshapes of the first block's attention to [B, L, H, C], whose last sizes may be left open."""
    for _, node in m.find("Reshape", r"blocks\.0\.attn.*"):
        sizes = m.sizes(node)
        if len(sizes) == 4 and (sizes[2] or 0) > 0:
            return int(sizes[2] or 0)
        if len(sizes) == 4 and (sizes[3] or 0) > 0:
            return width // int(sizes[3] or 0)
    if width % _HEAD_DIM:
        raise m.unknown("no reshape to heads")
    return width // _HEAD_DIM


def _check_conv(m: OnnxModules, module: str, **wanted: object) -> None:
    """That a module is one convolution with the attributes `wanted`."""
    nodes = [node for node in m.nodes.get(module, []) if node.op_type == "Conv"]
    if len(nodes) != 1:
        raise m.unknown(f"no convolution {module}")
    rank = (
        len(m.attribute(nodes[0], "kernel_shape", ()))
        or len(m.shape(f"{module}.weight", 4 if "head" in module else 3)) - 2
    )
    usual = {"strides": (1,) * rank, "dilations": (1,) * rank, "pads": (0,) * 2 * rank, "group": 1}
    for name, value in wanted.items():
        found = m.attribute(nodes[0], name, usual[name])
        if found != value:
            raise m.unknown(f"{module} has {name} {found}, not {value}")


def _check_epsilon(m: OnnxModules, kind: str) -> None:
    """Of the operators `kind`, and of layer norms in pieces, which add it as a number."""
    found = [(module, m.attribute(node, "epsilon", 1e-5)) for module, node in m.find(kind)]
    for module, node in m.find("Add", r".*_ln"):
        numbers = [known for known in map(m.constant, node.input) if known and math.prod(known.shape) == 1]
        found += [(module, float(known.read((slice(None),) * len(known.shape)).item())) for known in numbers]
    for module, epsilon in found:
        if not math.isclose(epsilon, 1e-5, rel_tol=1e-5):
            raise m.unknown(f"{module} has an epsilon of {epsilon:g}, not 1e-05")


def _check_bound(m: OnnxModules) -> None:
    """That what comes out of tanh is scaled as three levels a digit are, where a constant scales it."""
    for _, tanh in m.find("Tanh"):
        for node in m.consumers(tanh.output[0]):
            for known in filter(None, map(m.constant, node.input)):
                if node.op_type == "Mul" and not np.allclose(known.read((slice(None),) * len(known.shape)), BOUND):
                    raise m.unknown("a quantizer of other than three levels")


def read_campplus_onnx(path: str | os.PathLike[str]) -> tuple[SpeakerEncoderConfig, OnnxReader]:
    """(sizes of CAM++, the tensors under the names of `campplus_rules`), read when they are asked for.

    A batch norm that is folded into its convolution comes back as one that changes nothing but the bias: mean 0, variance
    1, scale √(1 + 1e-5). Of a segment that is not whole, a graph whose AveragePool counts the padding is read as "kernel",
    which is what it does in the onnxruntime that upstream pins.

    Raises: UnknownGraph for another structure, UserError for a file that is missing or damaged.
    """
    m = OnnxModules(OnnxFile(path), _CAMPPLUS_ROOTS)
    config = _campplus_config(m)
    for module, _ in m.find("Conv"):
        sizes = m.shape(f"{module}.weight", 4 if module.startswith("head.") else 3)[2:]
        is_local = module.endswith("cam_layer.linear_local")
        block = int(module.split(".")[1].removeprefix("block")) if is_local else 0
        dilation = config.dilations[block - 1] if is_local else 1
        pads = tuple(dilation * (size // 2) for size in sizes) * 2
        _check_conv(m, module, strides=conv_strides(module), dilations=(dilation,) * len(sizes), pads=pads, group=1)
    _check_epsilon(m, "BatchNormalization")
    norms = {norm: conv for conv, norm in folded_norms(config.block_layers).items()}
    abstract = jax.eval_shape(functools.partial(_init_campplus, config), jax.random.key(0))
    wanted = foreign_tensors(campplus_rules(), abstract, m.place)
    _check_plain(m, "xvector.dense.nonlinear.batchnorm")
    return config, m.reader(wanted, lambda name: _unfolded(m, name, wanted, norms))


def _init_campplus(config: SpeakerEncoderConfig, key: Key[Array, ""]) -> PyTree:
    """Parameters and statistics in one trace, which at this depth takes seconds."""
    features, num_frames = jnp.zeros((1, MIN_FRAMES, config.num_mels)), jnp.full((1,), MIN_FRAMES, jnp.int32)
    made = CamPlus(config).init_with_output(key, features, num_frames, None, training=False)
    (_, norms), variables = typing.cast(tuple, made)
    return {"encoder": nn.unbox(variables["params"]), "norms": norms}


def _unfolded(m: OnnxModules, name: str, wanted: dict[str, ForeignTensor], norms: dict[str, str]) -> Parameter | str:
    module, _, part = name.rpartition(".")
    if module not in norms or m.parameters.get(f"{module}.running_var"):
        return name
    if part == "bias":
        return f"{norms[module]}.bias"
    value = {"weight": math.sqrt(1 + EPSILON), "running_mean": 0.0, "running_var": 1.0}[part]
    return Parameter.of(np.full(wanted[name].shape, value, np.float32))


def _check_plain(m: OnnxModules, module: str) -> None:
    """That a batch norm neither scales nor shifts; the constants that say so are then forgotten."""
    for part, value in (("weight", 1), ("bias", 0)):
        for known in m.parameters.pop(f"{module}.{part}", []):
            if np.any(known.read((slice(None),)) != value):
                raise m.unknown(f"{module} has a {part}")
            m.forget(known)


def _campplus_config(m: OnnxModules) -> SpeakerEncoderConfig:
    counts, dilations = [], []
    num_blocks = m.count("xvector.block{}.tdnnd1.linear1.weight")
    for block in range(1, num_blocks + 1):
        counts.append(m.count(f"xvector.block{block}.tdnnd{{}}.linear1.weight"))
        local = m.find("Conv", rf"xvector\.block{block}\.tdnnd\d+\.cam_layer\.linear_local")
        found = {m.attribute(node, "dilations", (1,)) for _, node in local}
        if len(found) != 1:
            raise m.unknown(f"no one dilation of block {block}")
        dilations.append(found.pop()[0])
    if not num_blocks:
        raise m.unknown("no dense layers")
    head_channels = m.shape("head.conv1.weight", 4)[0]
    growth, width, _ = m.shape("xvector.block1.tdnnd1.cam_layer.linear_local.weight", 3)
    init_channels, flat, _ = m.shape("xvector.tdnn.linear.weight", 3)
    if width % growth or flat % head_channels:
        raise m.unknown(f"sizes {width} of {growth}, {flat} of {head_channels}")
    segment_frames, partial_segment = _segments(m)
    config = SpeakerEncoderConfig(
        num_mels=flat // head_channels * HEAD_STRIDE,
        head_channels=head_channels,
        init_channels=init_channels,
        growth=growth,
        bn_size=width // growth,
        block_layers=tuple(counts),
        dilations=tuple(dilations),
        embedding_dim=m.shape("xvector.dense.linear.weight", 3)[0],
        segment_frames=segment_frames,
        partial_segment="count" if partial_segment == "count" else "kernel",
    )
    try:
        config.validate()
    except UserError as error:
        raise m.unknown(str(error)) from error
    return config


def _segments(m: OnnxModules) -> tuple[int, str]:
    """(frames of a segment, what divides one that is not whole) of the poolings, which must agree."""
    found = set()
    for _, node in m.find("AveragePool", "xvector.*"):
        sizes, strides = (m.attribute(node, name, ()) for name in ("kernel_shape", "strides"))
        if len(sizes) != 1 or sizes != strides or any(m.attribute(node, "pads", (0, 0))):
            raise m.unknown(f"segments of {sizes} every {strides}")
        if m.attribute(node, "ceil_mode", 0):  # the official file
            rule = "kernel" if m.attribute(node, "count_include_pad", 0) else "count"
        elif getattr(m.producer(node.input[0]), "op_type", "") == "Pad":  # ours
            is_divided = any(user.op_type == "Div" for user in m.consumers(node.output[0]))
            rule = "count" if is_divided else "kernel"
        else:
            raise m.unknown("segments that leave out the last frames")
        found.add((sizes[0], rule))
    if len(found) != 1:
        raise m.unknown("no one rule of segments" if found else "no segments")
    return found.pop()
