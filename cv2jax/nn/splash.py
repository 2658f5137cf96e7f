"""Attention by JAX's splash kernel on TPU: logits never reach memory, and blocks that are masked whole are skipped."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as kernel_masks
from jaxtyping import Array, Float

from cv2jax.nn.masks import ChunkMask, MaskSpec
from cv2jax.parallel.sharding import map_local, num_batch_parts, platform

TILE = 128  # lengths are whole numbers of the kernel's smallest block
MAX_BLOCK = 512
HEAD_DIM_MULTIPLE = 64


class _KernelMask(kernel_masks.Mask):
    """A `ChunkMask` of a square, evaluated block by block; blocks that are masked whole are skipped."""

    def __init__(self, length: int, mask: ChunkMask) -> None:
        self._key = (length, mask)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._key[0], self._key[0])

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(self._key[0])[part] for part in idx)
        return self._key[1].sees(queries[:, None], keys[None])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KernelMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def fits_splash(mask: Any, num_rows: int) -> bool:
    """Whether the kernel, which is compiled for its mask, can take it: a mask array and chunks that are data it cannot.

    Rows with masks of their own are grouped on each device, whose share of the batch they must divide.
    """
    if mask is None:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else num_batch_parts(mesh.shape, num_rows)
    is_static = isinstance(mask, MaskSpec) and mask.chunk is None
    return is_static and num_rows // parts % max(len(mask.rows), 1) == 0


def attend_splash(
    q: Float[Array, "B T H C"], k: Float[Array, "B S K C"], v: Float[Array, "B S K C"], mask: MaskSpec
) -> Float[Array, "B T H C"]:
    """`cv2jax.nn.attention.attend` for as many keys as queries; off a TPU the kernel is interpreted, for tests.

    Under a mesh each device runs it on its rows, and on its heads where the tensor axis divides H and K. Head sizes that
    are no multiple of 64 are padded with zeros. Rows with chunk masks of their own run one kernel a mask. Raises
    ValueError unless S = T, a multiple of 128, and for chunks that are data or do not divide a device's rows.
    """
    if not fits_splash(mask, q.shape[0]):
        what = "chunks that are data" if mask.chunk is not None else f"{len(mask.rows)} masks for a device's rows"
        raise ValueError(f"splash attention cannot take {what}: its masks are static; use impl 'xla', or other rows")
    (_, num_queries, _, head_dim), num_keys = q.shape, k.shape[1]
    if num_queries != num_keys or num_queries % TILE:
        raise ValueError(
            f"splash attention got {num_queries} queries and {num_keys} keys; it needs as many, a multiple of {TILE}"
        )

    def heads_first(x: Float[Array, "B T H C"]) -> Float[Array, "B H T C_padded"]:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 0), (0, -head_dim % HEAD_DIM_MULTIPLE)))

    # The kernel does not scale its logits.
    args = [heads_first(q * head_dim**-0.5), heads_first(k), heads_first(v)]
    heads = ("batch", "act_heads", None, None)
    axes = [heads] * 3
    if mask.segments is not None:
        args, axes = [*args, mask.segments], [*axes, ("batch", None)]
    interpret = platform() != "tpu"

    def local(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        groups = mask.rows or (mask.kind,)

        def attend_group(which: ChunkMask | str, *rows: Array | None) -> Array:
            kernel = _make_kernel(which, q.shape[1], num_queries, interpret)
            ids = rows[3] if rows[3] is None else kernels.SegmentIds(q=rows[3], kv=rows[3])
            return jax.vmap(lambda q, k, v, ids: cast(Array, kernel(q, k, v, segment_ids=ids)))(
                rows[0], rows[1], rows[2], ids
            )

        of_group = lambda x, i: None if x is None else x[i :: len(groups)]  # noqa: E731
        parts = [attend_group(which, *(of_group(x, i) for x in (q, k, v, segments))) for i, which in enumerate(groups)]
        return jnp.stack(parts, axis=1).reshape(q.shape[0], *parts[0].shape[1:])

    if q.dtype.itemsize == 2:
        local = _at_default_precision(local)
    y = map_local(local, args, axes, heads)
    return jnp.swapaxes(y[..., :head_dim], 1, 2)


def _at_default_precision(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, and its gradient, whatever the caller's precision: Mosaic has no fp32 product of 16-bit operands.

    A gradient rule is traced later than the forward pass, out of reach of a context around that.
    """

    def forward(*args: Array) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
        with jax.default_matmul_precision("default"):
            return jax.vjp(function, *args)

    def backward(pull: Callable[[Array], tuple[Array, ...]], dy: Array) -> tuple[Array, ...]:
        with jax.default_matmul_precision("default"):
            return pull(dy)

    run = jax.custom_vjp(lambda *args: forward(*args)[0])
    run.defvjp(forward, backward)
    return run


def _make_kernel(which: ChunkMask | str, num_heads: int, length: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """Not cached: its tables are arrays of the trace that makes it."""
    if isinstance(which, ChunkMask):
        square = _KernelMask(length, which)
    else:
        square = {"full": kernel_masks.FullMask, "causal": kernel_masks.CausalMask}[which]((length, length))
    mask = kernel_masks.MultiHeadMask([square] * num_heads)
    block = max(size for size in range(TILE, MAX_BLOCK + 1, TILE) if length % size == 0)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
