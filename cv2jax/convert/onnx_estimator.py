"""Writes `flow.decoder.estimator.fp32.onnx`: the velocity network for TensorRT (spec/official.md 1.4, 4.4).

As upstream exports it, with full attention: every frame that the mask keeps sees every other. The names of its tensors are
those of upstream's export, in the layouts of torch.
"""

import os

import numpy as np
from jaxtyping import PyTree

from cv2jax.convert.flow import flow_rules
from cv2jax.convert.onnx_builder import GraphBuilder
from cv2jax.convert.rules import foreign_tensors
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.estimator import KERNEL_SIZE

OPSET = 18
NUM_ROWS = 2  # with and without the conditions
_PREFIX = "decoder.estimator."
# Of the score of a key that is not there: it counts for nothing, and half precision still holds it, so that an engine in
# fp16 never multiplies an infinity by 0.
_MASKED = 3e4


def write_estimator_onnx(path: str | os.PathLike[str], config: FlowMatchingConfig, params: PyTree) -> None:
    """Writes the graph x, mask, mu, t, spks, cond → estimator_out, all fp32, of two rows and any number S of frames.

    x, mu, cond and estimator_out are [2, M, S], mask [2, 1, S], t [2], spks [2, M].

    Args:
      path: of the file, written whole or not at all. config, params: of the flow; only "estimator" is read.

    Raises: UserError as `write_onnx`.
    """
    rules = [rule for rule in flow_rules() if rule.ours.startswith("estimator/")]
    tensors = foreign_tensors(rules, {"estimator": params["estimator"]}, str(path))
    g = GraphBuilder({name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})
    network = _Network(g, config)
    network.write()
    mels, mask = (NUM_ROWS, config.num_mels, "seq_len"), (NUM_ROWS, 1, "seq_len")
    sizes = {"x": mels, "mask": mask, "mu": mels, "t": mels[:1], "spks": mels[:2], "cond": mels}  # the order counts
    inputs = [(name, "float32", size) for name, size in sizes.items()]
    g.save(path, "flow_decoder_estimator", inputs, ("estimator_out", "float32", mels), OPSET)


class _Network:
    """The nodes; what passes between stages is [2, D, S]."""

    def __init__(self, g: GraphBuilder, config: FlowMatchingConfig) -> None:
        self.g, self.config = g, config

    def write(self) -> None:
        """Adds them all."""
        g, e = self.g, self.config.estimator
        spread = g.op("Shape", "x")
        speaker = g.op("Expand", g.op("Unsqueeze", "spks", g.ints(2)), spread)
        x = g.op("Concat", "x", "mu", speaker, "cond", axis=1)
        # 0 for a key that is there: [2, 1, 1, S], of heads and queries alike.
        missing = g.op("Sub", g.op("Unsqueeze", "mask", g.ints(1)), g.constant(1.0))
        self._bias = g.op("Mul", missing, g.constant(_MASKED))
        self._time = self._mish(self._embed_time(), "time_mlp")
        x = self._stage(x, "down_blocks.0")
        skip, x = x, self._conv(self._masked(x, "down_blocks.0"), "down_blocks.0.2")
        for index in range(e.num_mid_stages):
            x = self._stage(x, f"mid_blocks.{index}")
        x = self._stage(g.op("Concat", x, skip, axis=1), "up_blocks.0")
        x = self._conv(self._masked(x, "up_blocks.0"), "up_blocks.0.2")
        x = self._masked(self._block(x, "final_block"), "final_proj")
        weight, bias = (g.weight(f"final_proj.{part}") for part in ("weight", "bias"))
        g.op("Mul", g.conv(x, weight, bias, at="final_proj"), "mask", output="estimator_out")

    def _embed_time(self) -> str:
        g, half, at = self.g, 2 * self.config.num_mels, "time_embeddings"
        frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
        thousands = g.op("Mul", g.op("Unsqueeze", "t", g.ints(1), at=at), g.constant(1000.0), at=at)
        angles = g.op("Mul", thousands, g.constant(frequencies), at=at)
        x = g.op("Concat", g.op("Sin", angles, at=at), g.op("Cos", angles, at=at), at=at, axis=1)
        x = self._linear(x, "time_mlp.linear_1")
        x = g.op("Mul", x, g.op("Sigmoid", x, at="time_mlp/act"), at="time_mlp/act")
        return self._linear(x, "time_mlp.linear_2")

    def _stage(self, x: str, module: str) -> str:
        x = self._resnet(x, f"{module}.0")
        x = self.g.op("Transpose", x, at=_path(module), perm=(0, 2, 1))
        for index in range(self.config.estimator.num_blocks):
            x = self._transformer(x, f"{module}.1.{index}")
        return self.g.op("Transpose", x, at=_path(module), perm=(0, 2, 1))

    def _resnet(self, x: str, module: str) -> str:
        g, at = self.g, _path(module)
        time = self._linear(self._time, f"{module}.mlp.1")
        h = g.op("Add", self._block(x, f"{module}.block1"), g.op("Unsqueeze", time, g.ints(2), at=at), at=at)
        h = self._block(h, f"{module}.block2")
        weight, bias = (g.weight(f"{module}.res_conv.{part}") for part in ("weight", "bias"))
        return g.op("Add", h, g.conv(self._masked(x, module), weight, bias, at=f"{at}/res_conv"), at=at)

    def _block(self, x: str, module: str) -> str:
        """Causal convolution, norm over the channels, mish."""
        g, at = self.g, _path(module)
        x = self._conv(self._masked(x, module), f"{module}.block.0")
        x = g.layer_norm(g.op("Transpose", x, at=at, perm=(0, 2, 1)), f"{module}.block.2", f"{at}/block/block.2")
        x = self._mish(g.op("Transpose", x, at=at, perm=(0, 2, 1)), f"{at}/block/block.4")
        return self._masked(x, module)

    def _transformer(self, x: str, module: str) -> str:
        """x [2, S, D]."""
        g, e, at = self.g, self.config.estimator, _path(module)
        h = g.layer_norm(x, f"{module}.norm1", f"{at}/norm1")
        split, attention = g.ints(0, 0, e.num_heads, e.head_dim), f"{at}/attn1"
        q, k, v = (self._linear(h, f"{module}.attn1.to_{name}", has_bias=False) for name in "qkv")
        q, k, v = (g.op("Reshape", a, split, at=attention) for a in (q, k, v))
        q = g.op("Mul", q, g.constant(e.head_dim**-0.5), at=attention)
        q, v = (g.op("Transpose", a, at=attention, perm=(0, 2, 1, 3)) for a in (q, v))
        scores = g.op("MatMul", q, g.op("Transpose", k, at=attention, perm=(0, 2, 3, 1)), at=attention)
        weights = g.op("Softmax", g.op("Add", scores, self._bias, at=attention), at=attention, axis=-1)
        y = g.op("Transpose", g.op("MatMul", weights, v, at=attention), at=attention, perm=(0, 2, 1, 3))
        y = g.op("Reshape", y, g.ints(0, 0, e.num_heads * e.head_dim), at=attention)
        x = g.op("Add", self._linear(y, f"{module}.attn1.to_out.0"), x, at=at)
        h = self._linear(g.layer_norm(x, f"{module}.norm3", f"{at}/norm3"), f"{module}.ff.net.0.proj")
        h = self._linear(g.gelu(h, f"{at}/ff/net.0"), f"{module}.ff.net.2")
        return g.op("Add", h, x, at=at)

    def _conv(self, x: str, module: str) -> str:
        """Sees the frames before each, none behind."""
        weight, bias = (self.g.weight(f"{module}.{part}") for part in ("weight", "bias"))
        return self.g.conv(x, weight, bias, at=_path(module), pads=(KERNEL_SIZE - 1, 0))

    def _linear(self, x: str, module: str, *, has_bias: bool = True) -> str:
        return self.g.linear(x, module, _path(module), bias="" if has_bias else None)

    def _masked(self, x: str, module: str) -> str:
        return self.g.op("Mul", x, "mask", at=_path(module))

    def _mish(self, x: str, at: str) -> str:
        """In three operators, which every runtime has."""
        return self.g.op("Mul", x, self.g.op("Tanh", self.g.op("Softplus", x, at=at), at=at), at=at)


def _path(module: str) -> str:
    return module.replace(".", "/")
