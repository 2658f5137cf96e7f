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
    # G query heads share a key/value head: an axis of its own, so that keys and values are never repeated in memory.
    groups = num_heads // num_kv_heads
    scale = head_dim**-0.25
    grouped = (q * scale).reshape(*q.shape[:2], num_kv_heads, groups, head_dim)
    logits = jnp.einsum("btkgc,bskc->bkgts", grouped, k * scale, preferred_element_type=jnp.float32)
    if mask is not None:
        per_head = mask.shape[1] > 1
        shape = (mask.shape[0], num_kv_heads if per_head else 1, groups if per_head else 1, *mask.shape[2:])
        logits = logits + jnp.where(mask.reshape(shape), 0.0, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, v).reshape(q.shape)
