"""Attention over a functional cache that is indexed by absolute position.

Notation: B batch, W window, S cache length, H query heads, Hkv key/value heads, D head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import cpu_kernels
from mlspecqd_jax.folds import ordered_softmax
from mlspecqd_jax.network.moves import put_window


class KVCache(NamedTuple):
    """Keys and values of one layer, indexed by absolute position; it carries no length."""

    k: jax.Array  # [B, Hkv, S, D]
    v: jax.Array  # [B, Hkv, S, D]


def write(cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array) -> KVCache:
    """Store k and v [B, Hkv, W, D] at positions start[r] + 0..W-1; XLA updates both buffers in place inside (nested) loops."""
    return KVCache(put_window(cache.k, start, k), put_window(cache.v, start, v))


def finite(x: jax.Array) -> jax.Array:
    """Replace NaN and infinities by 0, so that a masked entry stays harmless (0 * NaN is NaN)."""
    return jnp.where(jnp.isfinite(x), x, 0)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the slots that a query sees, query heads grouped over key/value heads.

    Args:
      q: [B, H, W, D].
      k, v: [B, Hkv, S, D].
      first, last: int32 [B, W]; query w of row r sees the slots from first[r, w] to last[r, w], both included.

    Returns:
      [B, W, H * D] in q's dtype.
    """
    return cpu_kernels.on_cpu(_attend_on_cpu, _attend, q, k, v, first, last)


def _attend(q, k, v, first, last):
    batch, heads, window, dim = q.shape
    kv, slots = k.shape[1:3]
    groups = heads // kv
    slot = jnp.arange(slots)
    visible = (first[..., None] <= slot) & (slot <= last[..., None])  # [B, W, S]
    scores = _product(q.reshape(batch, kv, groups * window, dim), k, 3) * dim**-0.5
    scores = scores.reshape(batch, kv, groups, window, slots)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = ordered_softmax(scores).astype(v.dtype)
    out = _product(weights.reshape(batch, kv, groups * window, slots), v, 2).reshape(batch, heads, window, dim)
    return jnp.swapaxes(out, 1, 2).reshape(batch, window, heads * dim).astype(q.dtype)


@jax.custom_jvp
def _attend_on_cpu(q, k, v, first, last):
    out = cpu_kernels.attention(q, k, v, first, last)
    return out.reshape(*out.shape[:2], -1).astype(q.dtype)


@_attend_on_cpu.defjvp
def _(primals, tangents):
    _, tangent = jax.jvp(lambda q, k, v: _attend(q, k, v, *primals[3:]), primals[:3], tangents[:3])
    return _attend_on_cpu(*primals), tangent


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of a [B, H, R, X] with `axis` of b [B, H, ...] to f32 [B, H, R, ...]."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None

    def dot(a, b, batch_axes):
        last = batch_axes[-1] + 2
        axes = (((last,), (axis - 3 + last,)), (batch_axes, batch_axes))
        return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)

    def one_batch_axis(a, b):
        flat = dot(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]), (0,))
        return flat.reshape(*a.shape[:2], *flat.shape[1:])

    def two_batch_axes(a, b):
        return dot(a, b, (0, 1))

    # XLA:CPU has no 16-bit product with two batch axes and transposes the cache for an f32 one; on a mesh, merging the batch and
    # a split head axis would move the cache between devices.
    return jax.lax.platform_dependent(a, b, cpu=one_batch_axis, default=two_batch_axes)
