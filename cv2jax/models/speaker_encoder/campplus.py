"""CAM++: a 2-D convolutional head, densely connected layers over time with context masks, pooled statistics.

Source: 3D-Speaker's `DTDNN.py` (spec/frontends.md 2.2). There nothing is masked, so that a batch must be of one length; here
each convolution and each mean sees a row's own frames alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.layers import (
    INIT_SCALE,
    BatchNorm,
    DenseLayer,
    TimeConv,
    TimeFrequencyConv,
    keep,
    masked_statistics,
)
from cv2jax.nn.conv import strided_length
from cv2jax.nn.layers import Linear
from cv2jax.nn.masks import length_mask
from cv2jax.nn.stack import REMAT_POLICIES
from cv2jax.parallel.sharding import constrain

_TRAINING = 4  # the argument's place in `DenseLayer.__call__`, self being 0


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with a way around them; a stride of 2 halves the bands.

    Attributes:
      channels: in and out. stride: over frequency; other than 1, the way around is a convolution. dtype: of computation.
    """

    channels: int
    stride: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M D"], mask: Bool[Array, "B T"], norms: PyTree, training: bool
    ) -> tuple[Float[Array, "B T N D"], PyTree]:
        """(output, statistics)."""
        given, made = norms or {}, {}
        shape, x = (3, self.channels, self.channels), keep(x, mask)
        h = TimeFrequencyConv(shape, self.stride, self.dtype, name="conv1")(x)
        h, made["norm1"] = BatchNorm(name="norm1")(h, mask, given.get("norm1"), training)
        h = TimeFrequencyConv(shape, 1, self.dtype, name="conv2")(keep(jax.nn.relu(h), mask))
        h, made["norm2"] = BatchNorm(name="norm2")(h, mask, given.get("norm2"), training)
        if self.stride != 1:
            x = TimeFrequencyConv((1, *shape[1:]), self.stride, self.dtype, name="shortcut")(x)
            norm = BatchNorm(name="shortcut_norm")
            x, made["shortcut_norm"] = norm(x, mask, given.get("shortcut_norm"), training)
        return jax.nn.relu(h + x), made


class Head(nn.Module):
    """The features as an image: [B, T, M] to [B, T, channels · M / 8].

    Attributes:
      channels: of every convolution. dtype: of computation.
    """

    channels: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, features: Float[Array, "B T M"], mask: Bool[Array, "B T"], norms: PyTree, training: bool
    ) -> tuple[Float[Array, "B T E"], PyTree]:
        """(output, channels before bands as upstream flattens them; statistics)."""
        given, made = norms or {}, {}
        x = keep(features, mask)[..., None]
        x = TimeFrequencyConv((3, 1, self.channels), 1, self.dtype, name="conv1")(x)
        x, made["norm1"] = BatchNorm(name="norm1")(x, mask, given.get("norm1"), training)
        x = jax.nn.relu(x)
        for layer in (1, 2):
            for place, stride in enumerate((2, 1)):
                name = f"layer{layer}_{place}"
                block = ResidualBlock(self.channels, stride, self.dtype, name=name)
                x, made[name] = block(x, mask, given.get(name), training)
        x = TimeFrequencyConv((3, self.channels, self.channels), 2, self.dtype, name="conv2")(keep(x, mask))
        x, made["norm2"] = BatchNorm(name="norm2")(x, mask, given.get("norm2"), training)
        x = jnp.swapaxes(jax.nn.relu(x), 2, 3)
        return x.reshape(*x.shape[:2], -1), made


class CamPlus(nn.Module):
    """The network, with the parameters head, tdnn, block1 …, transit1 …, dense and their norms."""

    config: SpeakerEncoderConfig

    @nn.compact
    def __call__(
        self, features: Float[Array, "B F M"], num_frames: Int[Array, " B"], norms: PyTree, *, training: bool
    ) -> tuple[Float[Array, "B E"], PyTree]:
        """(embeddings in fp32, not normalised; statistics of the batch norms).

        Args:
          features: Kaldi fbank at 100 Hz less its mean over time. num_frames: valid frames of each row, 3 or more; a row
            of 0 counts nowhere, and its embedding means nothing.
          norms: statistics of the batch norms; None: none yet. training: normalise by the batch, and update them.
        """
        c, given, made = self.config, norms or {}, {}
        options = {"use_bias": False, "init_scale": INIT_SCALE, "dtype": c.dtype}
        mask = length_mask(num_frames, features.shape[1])
        x, made["head"] = Head(c.head_channels, c.dtype, name="head")(features, mask, given.get("head"), training)
        shape = (5, x.shape[-1], c.init_channels)
        x = TimeConv(shape, ("conv", "embed", "mlp"), stride=2, dtype=c.dtype, name="tdnn")(keep(x, mask))
        mask = length_mask(strided_length(num_frames), x.shape[1])
        x, made["tdnn_norm"] = BatchNorm(name="tdnn_norm")(x, mask, given.get("tdnn_norm"), training)
        x = jax.nn.relu(x)
        layer = DenseLayer
        if c.remat != "none":
            layer = nn.remat(DenseLayer, static_argnums=(_TRAINING,), policy=REMAT_POLICIES[c.remat])
        for index, (num_layers, dilation) in enumerate(zip(c.block_layers, c.dilations, strict=True), 1):
            sizes = (c.bn_size * c.growth, c.growth, dilation, c.segment_frames, c.partial_segment, c.dtype)
            for place in range(1, num_layers + 1):
                name = f"block{index}_layer{place}"
                x, made[name] = layer(*sizes, name=name)(x, mask, given.get(name), training)
            name = f"transit{index}_norm"
            x, made[name] = BatchNorm(name=name)(x, mask, given.get(name), training)
            shape, axes = (x.shape[-1], x.shape[-1] // 2), ("embed", "mlp")
            x = Linear(shape, axes, name=f"transit{index}", **options)(jax.nn.relu(x))
            x = constrain(x, "batch", "length", None)
        x, made["out_norm"] = BatchNorm(name="out_norm")(x, mask, given.get("out_norm"), training)
        pooled = masked_statistics(jax.nn.relu(x), mask)
        # In fp32 from here on, as is what the embedding is compared by.
        shape = (pooled.shape[-1], c.embedding_dim)
        embedding = Linear(shape, ("embed", None), name="dense", use_bias=False, precision="highest")(pooled)
        norm = BatchNorm(affine=False, name="dense_norm")
        embedding, made["dense_norm"] = norm(embedding, num_frames > 0, given.get("dense_norm"), training)
        return embedding, made
