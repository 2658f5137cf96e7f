"""Dense layers, layer norm and embeddings whose parameters carry logical axis names at their true shape."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cv2jax.parallel.sharding import constrain

Axes = tuple[str | None, ...]


def fan_in_init(num_input_axes: int, num_axes: int, scale: float = 1.0) -> jax.nn.initializers.Initializer:
    """Truncated normal of variance scale²/fan-in, for a kernel whose first `num_input_axes` axes are contracted."""
    inputs, outputs = tuple(range(num_input_axes)), tuple(range(num_input_axes, num_axes))
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)


def partitioned(init: jax.nn.initializers.Initializer, axes: Axes) -> Callable[..., Any]:
    """`init` boxed with logical axis names; `Any` because `Module.param` hands out the array and not the box it is told."""
    return nn.with_logical_partitioning(init, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_axes: int, precision: str | None = None
) -> Float[Array, "..."]:
    """Contracts the last `num_axes` axes of x with the first ones of kernel; reverse mode only.

    jax's own rule makes the kernel's gradient as its transpose, of which XLA on a CPU transposes an operand as large as
    the activations; here it comes as it lies, which saves a tenth of a training step of the language model.
    """
    return jnp.tensordot(x, kernel, axes=num_axes, precision=precision)


def _contract_forward(x: Array, kernel: Array, num_axes: int, precision: str | None) -> tuple[Array, Any]:
    # Not `contract` itself: a remat policy has to see the product.
    return jnp.tensordot(x, kernel, axes=num_axes, precision=precision), (x, kernel)


def _contract_backward(num_axes: int, precision: str | None, saved: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows, outputs = range(x.ndim - num_axes), range(x.ndim - num_axes, gradient.ndim)
    dot = functools.partial(jax.lax.dot_general, precision=precision)
    to_x = dot(gradient, kernel, ((outputs, range(num_axes, kernel.ndim)), ((), ())))
    return to_x, dot(x, gradient, ((rows, rows), ((), ())))


contract.defvjp(_contract_forward, _contract_backward)


class Linear(nn.Module):
    """Contracts the last `num_input_axes` axes of x with the first ones of a kernel of any rank, and adds a bias.

    The kernel is created at `shape` (e.g. [D, H, C] for heads), because flax's DenseGeneral initialises a flat kernel
    and then fails to constrain it with three axis names (google/flax#3676).

    Attributes:
      shape: kernel shape, input axes first.
      axes: logical axis name (or None) of each kernel axis; the bias takes the names of the output axes.
      num_input_axes: how many leading kernel axes are contracted.
      use_bias: whether to add a bias of shape `shape[num_input_axes:]`.
      dtype: computation dtype; parameters stay fp32.
      init_scale: standard deviation of the initial kernel relative to 1/√fan-in.
      kernel_init: how the kernel starts instead, for example `identity_init`.
      initial_bias: of every output.
      precision: matmul precision, for the few products that must not be rounded to bf16 on a TPU.
    """

    shape: tuple[int, ...]
    axes: Axes
    num_input_axes: int = 1
    use_bias: bool = True
    dtype: str = "float32"
    precision: str | None = None
    init_scale: float = 1.0
    kernel_init: jax.nn.initializers.Initializer | None = None
    initial_bias: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps [..., *shape[:num_input_axes]] to [..., *shape[num_input_axes:]] in `dtype`."""
        n = self.num_input_axes
        init = self.kernel_init or fan_in_init(n, len(self.shape), self.init_scale)
        kernel = self.param("kernel", partitioned(init, self.axes), self.shape).astype(self.dtype)
        y = contract(x.astype(self.dtype), kernel, n, self.precision)
        if self.use_bias:
            # An output axis called "embed" is the residual stream: its bias is small, so it is replicated like a norm.
            names = tuple("norm" if name == "embed" else name for name in self.axes[n:])
            initial = nn.initializers.constant(self.initial_bias)
            y = y + self.param("bias", partitioned(initial, names), self.shape[n:]).astype(self.dtype)
        return y


def identity_init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
    """The first outputs are the first inputs, for a path that is to carry what comes."""
    del key, out_sharding
    return jnp.eye(*shape, dtype=dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in fp32 with the exact variance and torch's epsilon of 1e-5.

    linen's own layer norm defaults to epsilon 1e-6 and E[x²]-E[x]², which both cost digits in parity tests.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises [..., D]; returns the dtype of x."""
        scale = self.param("scale", partitioned(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), (x.shape[-1],))
        y = jax.nn.standardize(x.astype(jnp.float32), axis=-1, variance=_variance(x), epsilon=self.epsilon)
        return (y * scale + bias).astype(x.dtype)


def _variance(x: Float[Array, "... D"]) -> Float[Array, "... 1"]:
    return jnp.var(x.astype(jnp.float32), axis=-1, keepdims=True)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis with a scale and no bias, computed in fp32 (Qwen2, spec/official.md 3.2)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises [..., D]; returns the dtype of x."""
        scale = self.param("scale", partitioned(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class Embedding(nn.Module):
    """A token table with a tied output projection.

    Attributes:
      vocabulary_size: number of tokens V.
      width: embedding size D.
      dtype: computation dtype.
    """

    vocabulary_size: int
    width: int
    dtype: str = "float32"

    def setup(self) -> None:
        init = nn.initializers.normal(1.0 / math.sqrt(self.width))
        self.table = self.param("table", partitioned(init, ("vocab", "embed")), (self.vocabulary_size, self.width))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up; scaled by √D so that the embeddings start with unit variance."""
        return self.table.astype(self.dtype)[tokens] * math.sqrt(self.width)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Projects onto the same table; fp32 logits."""
        table = self.table.astype(self.dtype)
        return jnp.einsum("btd,vd->btv", x.astype(self.dtype), table, preferred_element_type=jnp.float32)


class FeedForward(nn.Module):
    """Linear, exact (erf) GELU, Linear: the transformer MLP of Whisper and of the speech tokenizer.

    Attributes:
      width: D. hidden_dim: size between the two layers. dtype: computation dtype. out_scale: `init_scale` of the second.
    """

    width: int
    hidden_dim: int
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Maps [B, L, D] to [B, L, D]."""

        h = Linear((self.width, self.hidden_dim), ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        h = constrain(gelu(h), "batch", "length", "act_mlp")
        down = Linear(
            (self.hidden_dim, self.width), ("mlp", "embed"), dtype=self.dtype, init_scale=self.out_scale, name="down"
        )
        return down(h)


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) without biases: the SwiGLU MLP of Llama and Qwen2.

    Attributes:
      width: D. hidden_dim: size of gate and up. dtype: computation dtype.
    """

    width: int
    hidden_dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps [B, T, D] to [B, T, D]."""
        options = {"use_bias": False, "dtype": self.dtype}
        gate = Linear((self.width, self.hidden_dim), ("embed", "mlp"), name="gate", **options)(x)
        up = Linear((self.width, self.hidden_dim), ("embed", "mlp"), name="up", **options)(x)
        h = constrain(jax.nn.silu(gate) * up, "batch", "length", "act_mlp")
        return Linear((self.hidden_dim, self.width), ("mlp", "embed"), name="down", **options)(h)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact (erf) GELU as in torch; jax.nn.gelu would default to the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)
