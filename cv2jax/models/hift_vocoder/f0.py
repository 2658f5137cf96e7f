"""The F0 predictor (official `hifigan/f0_predictor.py`, spec/official.md 5.1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cv2jax.models.hift_vocoder.config import F0_LAYERS, F0_UNIT_HZ, MEL_UNIT, HiftVocoderConfig
from cv2jax.nn.layers import Linear
from cv2jax.nn.signal import Extent, Signal
from cv2jax.nn.signal_conv import SignalConv

_INITIAL_HZ = 100.0  # of a fresh predictor


class F0Predictor(nn.Module):
    """Five convolutions over the mel, of which the first `f0_look_ahead` see a frame ahead, and a projection to Hz."""

    config: HiftVocoderConfig

    @nn.compact
    def __call__(self, extent: Extent, mel: Signal) -> Signal:
        """mel [B F M] → fundamental frequency [B F 1], Hz ≥ 0, fp32."""
        c, x = self.config, mel.holding(mel.values / MEL_UNIT)
        for i in range(F0_LAYERS):
            shape = (3, c.num_mels if i == 0 else c.f0_width, c.f0_width)
            left = 1 if i < c.f0_look_ahead else 2
            origin = c.mel_origin / MEL_UNIT if i == 0 else 0.0
            y = SignalConv(shape, left=left, origin=origin, dtype=c.dtype, name=f"conv_{i}")(extent, x)
            x = y.holding(nn.elu(y.values))
        hidden = x.values.astype(jnp.float32)
        # Exact, because its errors add up in the phase.
        options: Any = {"initial_bias": _INITIAL_HZ / F0_UNIT_HZ, "precision": "highest"}
        f0 = F0_UNIT_HZ * jnp.abs(Linear((c.f0_width, 1), ("embed", None), name="out", **options)(hidden))
        return extent.mask(x.holding(f0))
