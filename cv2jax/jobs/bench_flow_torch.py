"""The official velocity network in PyTorch for `bench_flow`; torch is an extra.

Ported: flow/decoder.py and the blocks of Matcha-TTS that it uses (spec/official.md 4.4), with PyTorch's fused attention,
which is faster than the official product and softmax.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from jaxtyping import Bool, Float
from torch.nn import functional as F  # pyrefly: ignore[missing-import]

from cv2jax.models.flow_matching.config import EstimatorConfig


class OfficialEstimator:
    """The network with the weights of ours, in fp32 on the CPU.

    Args:
      config: sizes. params: of our `Estimator`, scanned or not. num_threads: of PyTorch; 0: as many as there are cores.
    """

    def __init__(self, config: EstimatorConfig, params: Mapping[str, Any], num_threads: int = 0) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(num_threads or cores)
        self._config, self._params = config, params
        self._final = _conv_block(params["final"])
        self._convs = {name: _conv(params[name]) for name in ("down_conv", "up_conv")}
        self._time = [_linear(params["time"][name]) for name in ("up", "down")]
        self._velocity = _linear(params["velocity"])
        mid = _layers(params, "mid", config.num_mid_stages)
        self._down, self._up, *self._mid = [self._stage(p) for p in (params["down"], params["up"], *mid)]

    def _stage(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "block1": _conv_block(params["block1"]),
            "block2": _conv_block(params["block2"]),
            "time": _linear(params["time"]),
            "residual": _linear(params["residual"]),
            "blocks": [_transformer_block(p) for p in _layers(params, "blocks", self._config.num_blocks)],
        }

    @torch.inference_mode()
    def __call__(
        self,
        x: Float[np.ndarray, "B F M"],
        time: Float[np.ndarray, " B"],
        mu: Float[np.ndarray, "B F M"],
        speaker: Float[np.ndarray, "B M"],
        prompt_mel: Float[np.ndarray, "B F M"],
        mask: Bool[np.ndarray, "F F"] | None,
    ) -> Float[np.ndarray, "B F M"]:
        """The velocity, as `Estimator`; mask: which frames see each other, None: all."""
        inputs = (x, mu, np.broadcast_to(speaker[:, None], x.shape), prompt_mel)
        h = torch.cat([torch.from_numpy(np.array(part)) for part in inputs], dim=-1)
        seen = None if mask is None else torch.from_numpy(mask)
        half = 4 * x.shape[2] // 2
        frequencies = torch.exp(torch.arange(half) * -(np.log(10000.0) / (half - 1)))
        angles = 1000.0 * torch.from_numpy(time)[:, None] * frequencies
        up, down = self._time
        embedded = F.linear(F.silu(F.linear(torch.cat([angles.sin(), angles.cos()], dim=-1), *up)), *down)
        skip = h = self._run_stage(self._down, h, embedded, seen)
        h = _apply_conv(h, self._convs["down_conv"])
        for stage in self._mid:
            h = self._run_stage(stage, h, embedded, seen)
        h = self._run_stage(self._up, torch.cat([h, skip], dim=-1), embedded, seen)
        h = _apply_conv_block(_apply_conv(h, self._convs["up_conv"]), self._final)
        return F.linear(h, *self._velocity).numpy()

    def _run_stage(
        self, stage: dict[str, Any], x: torch.Tensor, time: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        h = _apply_conv_block(x, stage["block1"]) + F.linear(F.mish(time), *stage["time"])[:, None]
        h = _apply_conv_block(h, stage["block2"]) + F.linear(x, *stage["residual"])
        c = self._config
        for block in stage["blocks"]:
            n = F.layer_norm(h, (c.width,), *block["attention_norm"])
            heads = lambda name: F.linear(n, block[name]).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)  # noqa: B023, E731
            y = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"), attn_mask=mask)
            h = h + F.linear(y.transpose(1, 2).flatten(2), *block["out"])
            n = F.layer_norm(h, (c.width,), *block["mlp_norm"])
            h = h + F.linear(F.gelu(F.linear(n, *block["up"])), *block["down"])
        return h


def _layers(params: Mapping[str, Any], name: str, count: int) -> Iterator[Any]:
    """The trees of the layers of a stack, scanned or not."""

    def part(tree: Any, index: int) -> Any:
        return {k: part(v, index) for k, v in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)[index]

    for i in range(count):
        yield part(params[name], i) if name in params else params[f"{name}_{i}"]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _linear(params: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(params["kernel"]).T.contiguous(), _tensor(params["bias"])


def _norm(params: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(params["scale"]), _tensor(params["bias"])


def _conv(params: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(params["kernel"]).permute(2, 1, 0).contiguous(), _tensor(params["bias"])


def _conv_block(params: Mapping[str, Any]) -> tuple[Any, Any]:
    return _conv(params["conv"]), _norm(params["norm"])


def _transformer_block(params: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: _tensor(params[name]["kernel"]).flatten(1).T.contiguous() for name in ("query", "key", "value")}
    out = _tensor(params["out"]["kernel"]).flatten(0, 1).T.contiguous()
    norms = {name: _norm(params[name]) for name in ("attention_norm", "mlp_norm")}
    mlp = {name: _linear(params["mlp"][name]) for name in ("up", "down")}
    return flat | norms | mlp | {"out": (out, _tensor(params["out"]["bias"]))}


def _apply_conv(x: torch.Tensor, conv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    padded = F.pad(x.transpose(1, 2), (conv[0].shape[2] - 1, 0))
    return F.conv1d(padded, *conv).transpose(1, 2)


def _apply_conv_block(x: torch.Tensor, block: tuple[Any, Any]) -> torch.Tensor:
    h = _apply_conv(x, block[0])
    return F.mish(F.layer_norm(h, (h.shape[2],), *block[1]))
