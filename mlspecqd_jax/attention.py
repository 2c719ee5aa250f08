"""Attention over a functional cache that is indexed by absolute position.

Notation: B batch, W window, S cache length, H query heads, Hkv key/value heads, D head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.bits import put


class KVCache(NamedTuple):
    """Keys and values of one layer, indexed by absolute position; it carries no length."""

    k: jax.Array  # [B, Hkv, S, D]
    v: jax.Array  # [B, Hkv, S, D]


def write(cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
    """Store k and v [B, Hkv, W, D] at absolute positions [B, W]; positions beyond the buffer are dropped."""
    # Head-major buffers and one scatter a tensor: XLA updates both in place inside (nested) while loops.
    row = jnp.arange(k.shape[0])[:, None, None]
    head = jnp.arange(k.shape[1])[None, :, None]
    at = row, head, positions[:, None, :]
    return KVCache(put(cache.k, at, k), put(cache.v, at, v))


def finite(x: jax.Array) -> jax.Array:
    """Replace NaN and infinities by 0, so that a masked entry of a cache stays harmless (0 * NaN is NaN)."""
    return jnp.where(jnp.isfinite(x), x, 0)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the visible slots, query heads grouped over key/value heads.

    Args:
      q: [B, H, W, D].
      k, v: [B, Hkv, S, D].
      visible: bool [B, W, S].

    Returns:
      [B, W, H * D] in q's dtype.
    """
    # XLA:CPU has no 16-bit product with two batch axes; on a mesh, merging a batch and a split head axis would move the cache.
    return jax.lax.platform_dependent(q, k, v, visible, cpu=_attend_merged, default=_attend)


def _attend(q, k, v, visible):
    batch, heads, window, dim = q.shape
    kv = k.shape[1]
    grouped = q.reshape(batch, kv, heads // kv, window, dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = product("bhgwd,bhsd->bhgws", grouped, k) * dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("bhgws,bhsd->bwhgd", weights, v)
    return out.reshape(batch, window, heads * dim).astype(q.dtype)


def _attend_merged(q, k, v, visible):
    """`_attend` with every key/value head as a batch row of its own."""
    batch, kv, slots, dim = k.shape
    window = q.shape[2]
    out = _attend(
        q.reshape(batch * kv, -1, window, dim),
        k.reshape(batch * kv, 1, slots, dim),
        v.reshape(batch * kv, 1, slots, dim),
        jnp.repeat(visible, kv, axis=0),
    )
    return jnp.swapaxes(out.reshape(batch, kv, window, -1), 1, 2).reshape(batch, window, -1)
