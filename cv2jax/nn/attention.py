"""Scaled dot-product attention: the one place where logits, mask and softmax meet."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cv2jax.nn.masks import MaskSpec
from cv2jax.nn.splash import TILE, attend_splash, fits_splash
from cv2jax.parallel.sharding import platform

MASKED_LOGIT = (
    -1e10
)  # added, not -inf: a row without any valid key stays finite (official S3 v2 and FunASR do the same)


MAX_SIDE_BY_SIDE = 16  # heads of all rows that are products of their own: more compile longer
BLOCK, MAX_BLOCKS = 128, 16  # of queries, on the causal path: smaller blocks skip more, and more of them compile longer
IMPLS = ("xla", "splash", "cudnn", "auto")

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    *,
    mask: Bool[Array, "#B #H #T S"] | MaskSpec | None = None,
    impl: str = "xla",
) -> Float[Array, "B T H C"]:
    """Softmax attention with fp32 logits and softmax; query heads share K key/value heads in groups of H/K.

    Rows whose keys are all masked give some finite value, to be ignored by the caller.

    Args:
      q, k, v: queries, keys, values. mask: True = keep; None: every query sees every key.
      impl: "xla" anywhere; "splash" without a mask or with a MaskSpec (see `attend_splash`), meant for TPU; "cudnn" on
        NVIDIA GPUs from Ampere on, with 16-bit operands; "auto": the fastest that can run here, for this call.

    Raises ValueError for an unknown `impl`, when K does not divide H, or when `impl` cannot do what is asked.
    """
    if impl not in IMPLS:
        raise ValueError(f"attention impl {impl!r} is unknown; known: {', '.join(IMPLS)}")
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} query heads")
    if isinstance(mask, MaskSpec):
        mask.require(q.shape[1], k.shape[1])
    if impl == "auto":
        impl = _fastest(q, k, mask)
    if impl == "splash":
        if not isinstance(mask, MaskSpec | None):
            raise ValueError("splash attention cannot take a mask array; pass a MaskSpec, or use impl 'xla'")
        return attend_splash(q, k, v, mask or MaskSpec())
    if impl == "cudnn":
        return _attend_cudnn(q, k, v, mask)
    if isinstance(mask, MaskSpec):
        if mask.kind == "causal" and q.shape[1] == k.shape[1] > BLOCK:
            return _attend_causal(q, k, v, mask.segments)
        mask = mask.array(q.shape[1], k.shape[1], q.shape[0])
    return _attend_grouped(q, k, v, mask)


def _fastest(q: Float[Array, "B T H C"], k: Float[Array, "B S K C"], mask: Array | MaskSpec | None) -> str:
    where, length = platform(), q.shape[1]
    if where == "tpu" and fits_splash(mask, q.shape[0]) and length == k.shape[1] and length % TILE == 0:
        return "splash"
    # Flash attention of cuDNN: one query a row (decoding) is left to XLA, and lengths that it cannot differentiate.
    fits = length > 1 and length % 2 == k.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return "cudnn" if where == "gpu" and q.dtype.itemsize == 2 and fits and _has_tensor_core_attention() else "xla"


def _has_tensor_core_attention() -> bool:
    """Whether the GPU is of NVIDIA and Ampere or later; others report no such number ("gfx942")."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return major.isdigit() and int(major) >= 8


def _attend_cudnn(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    mask: Bool[Array, "#B #H #T S"] | MaskSpec | None,
) -> Float[Array, "B T H C"]:
    if platform() != "gpu" or q.dtype.itemsize != 2:
        raise ValueError(
            f"cudnn attention needs an NVIDIA GPU and bfloat16 or float16, not {platform()} and {q.dtype}; use impl 'xla'"
        )
    is_causal, mask = cudnn_mask(mask, q.shape[1], k.shape[1], q.shape[0])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn")


def cudnn_mask(
    mask: Bool[Array, "#B #H #T S"] | MaskSpec | None, num_queries: int, num_keys: int, num_rows: int = 1
) -> tuple[bool, Bool[Array, "#B #H T S"] | None]:
    """(is_causal, mask) for `jax.nn.dot_product_attention`, whose kernel skips what lies above the diagonal."""
    causal = isinstance(mask, MaskSpec) and mask.kind == "causal"
    if isinstance(mask, MaskSpec):
        rest = MaskSpec(segments=mask.segments) if causal else mask
        is_open = rest.kind == "full" and rest.segments is None
        mask = None if is_open else rest.array(num_queries, num_keys, num_rows)
    if mask is not None:  # the kernel broadcasts over rows and heads, not over queries
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], num_queries, num_keys))
    return causal, mask


def _attend_heads(
    q: Float[Array, "B T H C"], k: Float[Array, "B S H C"], v: Float[Array, "B S H C"], mask: Array | None
) -> Float[Array, "B T H C"]:
    """q and k are each scaled by C^-0.25 before the product, so that bf16 or fp16 operands stay small."""
    scale = q.shape[3] ** -0.25
    logits = _product("bthc,bshc->bhts", q * scale, k * scale)
    if mask is not None:
        logits = logits + jnp.where(mask, 0.0, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def _are_few_and_long(q: Float[Array, "B T H C"], k: Float[Array, "B S H C"]) -> bool:
    """Whether heads are products of their own: on a CPU, and only whole ones, as parts of an array would be exchanged."""
    few, is_long = q.shape[0] * q.shape[2] <= MAX_SIDE_BY_SIDE, min(q.shape[1], k.shape[1]) >= BLOCK
    return few and is_long and platform() == "cpu" and jax.sharding.get_abstract_mesh().empty


def _attend_side_by_side(
    q: Float[Array, "B T H C"], k: Float[Array, "B S H C"], v: Float[Array, "B S H C"], mask: Array | None
) -> Float[Array, "B T H C"]:
    """As `_attend_heads`. XLA on a CPU runs products of their own side by side, and those of a batch one after the other.

    That, and a division of the result instead of the weights, takes a third off the time.
    """
    if mask is not None:
        mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], *mask.shape[2:]))

    def attend_one(row: int, head: int) -> Float[Array, "T C"]:
        one = lambda x: x[row, :, head]  # noqa: E731
        logits = _product("tc,sc->ts", one(q) * q.shape[3] ** -0.5, one(k))
        if mask is not None:
            logits = logits + jnp.where(mask[row, head], 0.0, MASKED_LOGIT)
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        y = _product("ts,sc->tc", weights.astype(v.dtype), one(v))
        return (y / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

    rows, heads = range(q.shape[0]), range(q.shape[2])
    return jnp.stack([jnp.stack([attend_one(row, head) for head in heads], axis=1) for row in rows])


def _attend_grouped(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    mask: Bool[Array, "#B #H #T S"] | None,
) -> Float[Array, "B T H C"]:
    """The query heads of a group become further queries of their key/value head, so that it is never copied for each.

    On a CPU a decoding step over a cache of 500 positions is four times faster so than with repeated keys and values.
    """
    (num_rows, num_queries, num_heads, head_dim), num_kv_heads = q.shape, k.shape[2]
    if num_kv_heads == num_heads:
        attend_all = _attend_side_by_side if _are_few_and_long(q, k) else _attend_heads
        return attend_all(q, k, v, mask)
    groups = num_heads // num_kv_heads
    folded = q.reshape(num_rows, num_queries, num_kv_heads, groups, head_dim)
    folded = jnp.moveaxis(folded, 3, 1).reshape(num_rows, groups * num_queries, num_kv_heads, head_dim)
    if mask is not None:
        heads = (num_kv_heads, groups) if mask.shape[1] > 1 else (1, 1)
        mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], groups, num_queries, mask.shape[4]))
        mask = mask.reshape(*mask.shape[:2], groups * num_queries, mask.shape[4])
    y = _attend_heads(folded, k, v, mask)
    y = y.reshape(num_rows, groups, num_queries, num_kv_heads, head_dim)
    return jnp.moveaxis(y, 1, 3).reshape(q.shape)


def _attend_causal(
    q: Float[Array, "B T H C"], k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], segments: Array | None
) -> Float[Array, "B T H C"]:
    """Causal attention by blocks of queries, each over the keys up to its end: half of the work, and no logits are kept.

    The query heads of a group become further rows of their key/value head, side by side for one position. On a CPU two
    to four times as fast with its gradient as under a mask array (14:2 heads of 64, 512 to 2048 positions, fp32).
    """
    (num_rows, length, num_heads, head_dim), num_kv_heads = q.shape, k.shape[2]
    scale = head_dim**-0.25
    folded = (q * scale).reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    folded = jnp.swapaxes(folded, 1, 2).reshape(num_rows, num_kv_heads, -1, head_dim)
    segments = jnp.zeros((1, length), jnp.int32) if segments is None else segments
    y = _causal_blocks(folded, jnp.swapaxes(k * scale, 1, 2), jnp.swapaxes(v, 1, 2), segments)
    return jnp.swapaxes(y.reshape(num_rows, num_kv_heads, length, -1, head_dim), 1, 2).reshape(q.shape)


@jax.custom_vjp
def _causal_blocks(
    q: Float[Array, "B K TG C"], k: Float[Array, "B K T C"], v: Float[Array, "B K T C"], segments: Int[Array, "#B T"]
) -> Float[Array, "B K TG C"]:
    return _causal_forward(q, k, v, segments)[0]


def _causal_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    outputs, normalizers = [], []
    for rows, keys in _blocks(q, k):
        logits = _block_logits(q, k, segments, rows, keys)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outputs.append(_product("bkts,bksc->bktc", weights.astype(v.dtype), v[:, :, keys]) / total)
        normalizers.append(largest + jnp.log(total))
    y = jnp.concatenate(outputs, axis=2).astype(v.dtype)
    return y, (q, k, v, segments, y, jnp.concatenate(normalizers, axis=2))


def _causal_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    """Weights are computed again from the normalizers, as in flash attention (arXiv:2205.14135, algorithm 4)."""
    q, k, v, segments, y, normalizers = saved
    mean = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, keys in _blocks(q, k):
        weights = jnp.exp(_block_logits(q, k, segments, rows, keys) - normalizers[:, :, rows])
        dweights = _product("bktc,bksc->bkts", dy[:, :, rows], v[:, :, keys])
        dlogits = (weights * (dweights - mean[:, :, rows])).astype(k.dtype)
        dq.append(_product("bkts,bksc->bktc", dlogits, k[:, :, keys]))
        dk = dk.at[:, :, keys].add(_product("bkts,bktc->bksc", dlogits, q[:, :, rows]))
        dv = dv.at[:, :, keys].add(_product("bkts,bktc->bksc", weights.astype(v.dtype), dy[:, :, rows]))
    return jnp.concatenate(dq, axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_causal_blocks.defvjp(_causal_forward, _causal_backward)


def _blocks(q: Float[Array, "B K TG C"], k: Float[Array, "B K T C"]) -> list[tuple[slice, slice]]:
    """The query rows and the keys of at most MAX_BLOCKS blocks, of whole BLOCKs of positions but for the last."""
    length, group = k.shape[2], q.shape[2] // k.shape[2]
    size = BLOCK * -(-length // (BLOCK * MAX_BLOCKS))
    spans = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [(slice(start * group, end * group), slice(0, end)) for start, end in spans]


def _block_logits(
    q: Float[Array, "B K TG C"], k: Float[Array, "B K T C"], segments: Int[Array, "#B T"], rows: slice, keys: slice
) -> Float[Array, "B K rows keys"]:
    """fp32, and masked."""
    group = q.shape[2] // k.shape[2]
    places = jnp.arange(rows.start, rows.stop)[:, None] // group
    mask = (jnp.arange(keys.stop) <= places) & (segments[:, places] == segments[:, None, keys])
    return jnp.where(mask[:, None], _product("bktc,bksc->bkts", q[:, :, rows], k[:, :, keys]), MASKED_LOGIT)
