"""Sizes of the speaker encoder, and what it is trained with (spec/frontends.md 2)."""

import dataclasses
from typing import Literal

from cv2jax.config import UserError
from cv2jax.nn.stack import REMAT_POLICIES

HEAD_STRIDE = 8  # of the head, over frequency


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeakerEncoderConfig:
    """CAM++ as released by default; then its loss, and how utterances are cut and disturbed for training."""

    num_mels: int = 80
    head_channels: int = 32  # of the two-dimensional convolutions in front
    init_channels: int = 128  # of the first layer over time
    growth: int = 32  # channels that each dense layer adds
    bn_size: int = 4  # a dense layer's bottleneck, in growths
    block_layers: tuple[int, ...] = (12, 24, 16)  # dense layers of each block
    dilations: tuple[int, ...] = (1, 2, 2)  # of each block
    embedding_dim: int = 192
    segment_frames: int = 100  # at 50 Hz, of the context that masks a dense layer's output
    # The mean of a last segment that is not whole: over the frames there are (PyTorch, onnxruntime from 1.29), or their sum
    # over all of `segment_frames` (onnxruntime up to 1.28, which upstream pins).
    partial_segment: Literal["count", "kernel"] = "count"
    # AAM-softmax: the margin is 0 up to step `margin_start`, and grows to `margin` at `margin_end`.
    scale: float = 32.0
    margin: float = 0.2
    margin_start: int = 0
    margin_end: int = 0
    crop_seconds: float = 3.0
    speeds: tuple[float, ...] = (1.0,)  # played faster or slower, a speaker counts as another one
    noise_share: float = 0.0  # of the crops get white noise
    min_snr_db: float = 0.0
    max_snr_db: float = 15.0
    max_gain_db: float = 0.0  # louder or softer by up to so much
    remat: str = "none"
    dtype: str = "float32"

    def validate(self) -> None:
        """Raises UserError for what cannot be built or trained."""
        sizes = "num_mels head_channels init_channels growth bn_size embedding_dim segment_frames scale crop_seconds"
        for name in sizes.split():
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must be positive")
        for name in ("margin_start", "max_gain_db"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must not be negative")
        if self.num_mels % HEAD_STRIDE:
            raise UserError(f"model.num_mels={self.num_mels}: must be a multiple of {HEAD_STRIDE}")
        if len(self.block_layers) != len(self.dilations) or not self.block_layers:
            raise UserError("model.block_layers, dilations: give as many of each, one or more")
        for name in ("block_layers", "dilations", "speeds"):
            if min(getattr(self, name), default=0) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)}: give positive numbers, one or more")
        if not 0 <= self.margin < 1.5:
            raise UserError(f"model.margin={self.margin}: must lie in 0 … 1.5 radians")
        if self.margin_end < self.margin_start:
            raise UserError(f"model.margin_end={self.margin_end}: must not lie before model.margin_start")
        if not 0 <= self.noise_share <= 1:
            raise UserError(f"model.noise_share={self.noise_share}: must lie in 0 … 1")
        if self.min_snr_db > self.max_snr_db:
            raise UserError(f"model.min_snr_db={self.min_snr_db}: must not exceed model.max_snr_db={self.max_snr_db}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat}: choose one of {', '.join(REMAT_POLICIES)}")
