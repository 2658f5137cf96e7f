"""Encoder1 of the speech tokenizer (S3 v2): two strided convolutions and rotary blocks with FSMN memory.

Ported maths: spec/frontends.md 1.2 (SenseVoice-Large's encoder, `self_att_fsmn_sdpa`).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cv2jax.nn.attention import attend
from cv2jax.nn.conv import Conv1d, FsmnMemory, strided_length
from cv2jax.nn.layers import FeedForward, LayerNorm, Linear, gelu
from cv2jax.nn.masks import key_mask, length_mask
from cv2jax.nn.rope import apply_rope, rope_angles
from cv2jax.nn.stack import apply_stack
from cv2jax.parallel.sharding import constrain


class FsmnAttention(nn.Module):
    """Rotary self-attention whose values also pass through an FSMN memory, added *after* the output projection.

    Attributes:
      width: D. num_heads: H (head dim D/H, even). fsmn_kernel: taps of the memory. dtype: computation dtype.
    """

    width: int
    num_heads: int
    fsmn_kernel: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], angles: Float[Array, "L C_half"]
    ) -> Float[Array, "B L D"]:
        """Attends over the True positions of mask."""
        head_dim = self.width // self.num_heads
        shape, axes = (self.width, self.num_heads, head_dim), ("embed", "heads", "head_dim")
        q = Linear(shape, axes, dtype=self.dtype, name="query")(x)
        k = Linear(shape, axes, use_bias=False, dtype=self.dtype, name="key")(x)
        v = Linear(shape, axes, dtype=self.dtype, name="value")(x)
        q, k, v = (constrain(a, "batch", "length", "act_heads", None) for a in (q, k, v))
        memory = FsmnMemory(self.num_heads, head_dim, self.fsmn_kernel, dtype=self.dtype, name="fsmn")(v, mask)
        y = attend(apply_rope(q, angles), apply_rope(k, angles), v, mask=key_mask(mask))
        out = Linear(
            (self.num_heads, head_dim, self.width),
            ("heads", "head_dim", "embed"),
            num_input_axes=2,
            dtype=self.dtype,
            name="out",
        )
        return out(y) + memory.reshape(x.shape)


class EncoderBlock(nn.Module):
    """Pre-norm block x += attention(norm(x)); x += MLP(norm(x)), used by Encoder1 and Encoder2.

    Attributes: as FsmnAttention, and mlp_ratio (hidden MLP size / D), dropout (rate on both branches).
    """

    width: int
    num_heads: int
    mlp_ratio: int
    fsmn_kernel: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        state: None,
        deterministic: bool,
        mask: Bool[Array, "B L"],
        angles: Float[Array, "L C_half"],
    ) -> tuple[Float[Array, "B L D"], PyTree]:
        """Returns (x, None): the call shape of `cv2jax.nn.stack.apply_stack`."""
        attention = FsmnAttention(self.width, self.num_heads, self.fsmn_kernel, dtype=self.dtype, name="attention")
        y = attention(LayerNorm(name="attention_norm")(x), mask, angles)
        x = x + nn.Dropout(self.dropout)(y, deterministic=deterministic)
        mlp = FeedForward(self.width, self.mlp_ratio * self.width, dtype=self.dtype, name="mlp")
        y = mlp(LayerNorm(name="mlp_norm")(x))
        x = x + nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return constrain(x, "batch", "length", "act_embed"), state


class EncoderStack(nn.Module):
    """`num_layers` EncoderBlocks over 25 Hz positions, with a final norm (Encoder2) or without (Encoder1).

    Attributes: as EncoderBlock, and num_layers, rope_theta, final_norm, remat and scan (see `apply_stack`).
    """

    width: int
    num_heads: int
    num_layers: int
    mlp_ratio: int
    fsmn_kernel: int
    rope_theta: float
    final_norm: bool = False
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], *, deterministic: bool
    ) -> Float[Array, "B L D"]:
        """Runs the blocks; positions start at 0 in every row."""
        angles = rope_angles(jnp.arange(x.shape[1]), self.width // self.num_heads, self.rope_theta)
        fields = {
            "width": self.width,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "fsmn_kernel": self.fsmn_kernel,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        options = {"num_layers": self.num_layers, "remat": self.remat, "scan": self.scan}
        x, _ = apply_stack(EncoderBlock, fields, x, None, mask, angles, deterministic=deterministic, **options)
        return LayerNorm(name="final_norm")(x) if self.final_norm else x


class SpeechEncoder(nn.Module):
    """Encoder1: log-mel frames at 100 Hz to hidden vectors at 25 Hz.

    Attributes: as EncoderStack (num_layers blocks, no final norm), and num_mels (M).
    """

    num_mels: int
    width: int
    num_heads: int
    num_layers: int
    mlp_ratio: int
    fsmn_kernel: int
    rope_theta: float
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, mel: Float[Array, "B M F"], num_frames: Int[Array, " B"], *, deterministic: bool
    ) -> tuple[Float[Array, "B L D"], Int[Array, " B"]]:
        """Returns (hidden [B, ceil(F/4), D], number of valid positions ceil(num_frames/4) [B]).

        Frames past num_frames are zeroed before *each* convolution, so that padding of any content changes nothing.
        """
        x = jnp.swapaxes(mel, 1, 2)
        lengths = num_frames
        for name, in_dim, axes in (
            ("conv1", self.num_mels, ("conv", None, "embed")),
            ("conv2", self.width, ("conv", "embed", None)),
        ):
            x = jnp.where(length_mask(lengths, x.shape[1])[:, :, None], x, 0)
            conv = Conv1d((3, in_dim, self.width), axes, stride=2, padding=1, dtype=self.dtype, name=name)
            x, lengths = gelu(conv(x)), strided_length(lengths)
            x = constrain(x, "batch", "length", "act_embed")
        stack = EncoderStack(
            self.width,
            self.num_heads,
            self.num_layers,
            self.mlp_ratio,
            self.fsmn_kernel,
            self.rope_theta,
            dropout=self.dropout,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="stack",
        )
        return stack(x, length_mask(lengths, x.shape[1]), deterministic=deterministic), lengths
