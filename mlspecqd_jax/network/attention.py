"""Attention over a functional cache that is indexed by absolute position.

Notation: B batch, W window, S cache length, H query heads, Hkv key/value heads, D size of a query's and a key's head, Dv of a
value's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import BLOCK, ordered_softmax


class KVCache(NamedTuple):
    """Keys and values of one layer, indexed by absolute position; it carries no length."""

    k: jax.Array  # [B, Hkv, S, D]
    v: jax.Array  # [B, Hkv, S, Dv]


def finite(x: jax.Array) -> jax.Array:
    """Replace NaN and infinities by 0, so that a masked entry stays harmless (0 * NaN is NaN)."""
    return jnp.where(jnp.isfinite(x), x, 0)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
    sinks: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
) -> jax.Array:
    """softmax(cap tanh(scale q k^T / cap)) v over the slots that a query sees, query heads grouped over key/value heads.

    Args:
      q: [B, H, W, D].
      k: [B, Hkv, S, D].
      v: [B, Hkv, S, Dv].
      first, last: int32 [B, W]; query w of row r sees the slots from first[r, w] to last[r, w], both included.
      sinks: [H], a logit of each head that the softmax sums too, and whose probability goes to no value; or None.
      scale: of the products.
      cap: bound of the logits' magnitude, softly (Gemma 2, arXiv 2408.00118, section 2); None leaves them as they are.

    Returns:
      [B, W, H * Dv] in q's dtype.
    """
    batch, heads, window, dim = q.shape
    kv, slots = k.shape[1:3]
    groups = heads // kv
    slot = jnp.arange(slots)[None, None, :]
    visible = (first[..., None] <= slot) & (slot <= last[..., None])  # [B, W, S]
    scores = _product(q.reshape(batch, kv, groups * window, dim), k, 3).reshape(batch, kv, groups, window, slots)
    sinks = None if sinks is None else jnp.broadcast_to(sinks.reshape(kv, groups, 1), scores.shape[:-1])
    weights = _weights(scores, visible[:, None, None], sinks, scale, cap).astype(v.dtype)
    out = _product(weights.reshape(batch, kv, groups * window, slots), v, 2).reshape(batch, heads, window, -1)
    return jnp.swapaxes(out, 1, 2).reshape(batch, window, -1).astype(q.dtype)


def _weights(scores, visible, sinks, scale, cap):
    """Return the softmax, f32, of products of queries and keys f32 [..., S], where they are visible."""
    scores = scores * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    return ordered_softmax(jnp.where(visible, scores, -jnp.inf), None if sinks is None else sinks.astype(jnp.float32))


def attend_by_query(q, k, v, first, last, sinks=None, *, scale: float, cap: float | None = None):
    """`attend` for XLA:CPU, one query after another and the slots in blocks, so that all products are of one shape.

    XLA:CPU adds up a product in an order that its sizes decide, so one over a window, or over all slots of a buffer, would make a
    query's bits depend on both. Blocks that a query does not see are not read.
    """
    batch, heads, window, _ = q.shape
    kv, slots = k.shape[1:3]
    fill = ((0, 0), (0, 0), (0, -slots % BLOCK), (0, 0))
    k, v = (array if slots % BLOCK == 0 else jnp.pad(array, fill) for array in (k, v))
    q = q.reshape(batch, kv, heads // kv, window, -1)
    sinks = None if sinks is None else sinks.reshape(kv, -1)

    def block(array, row, i):
        # Else XLA:CPU, which slices no 16-bit floats, makes an f32 copy of the whole cache before the loop (`moves.rows`).
        array, i = jax.lax.optimization_barrier((array, i))
        sizes = (1, kv, BLOCK, array.shape[3])
        return jax.lax.dynamic_slice(array, (row, 0, i * BLOCK, 0), sizes)[0]

    def one(at):
        row, w = at // window, at % window
        begin, end = first[row, w], last[row, w]
        blocks = jnp.maximum(begin, 0) // BLOCK, jnp.minimum(end, slots - 1) // BLOCK + 1
        query = q[row, :, :, w]

        def score(i, scores):
            return jax.lax.dynamic_update_slice(scores, _dot(query, block(k, row, i), 2), (0, 0, i * BLOCK))

        scores = jax.lax.fori_loop(*blocks, score, jnp.zeros((kv, heads // kv, k.shape[2]), jnp.float32))
        slot = jnp.arange(k.shape[2])[None, None, :]
        weights = _weights(scores, (begin <= slot) & (slot <= end), sinks, scale, cap)

        def add(i, out):
            return out + _dot(jax.lax.dynamic_slice_in_dim(weights, i * BLOCK, BLOCK, 2), block(v, row, i), 1)

        return jax.lax.fori_loop(*blocks, add, jnp.zeros((kv, heads // kv, v.shape[3]), jnp.float32))

    out = jax.lax.map(one, jnp.arange(batch * window))  # [B * W, Hkv, H / Hkv, Dv]
    return out.reshape(batch, window, -1).astype(q.dtype)


def _dot(a, b, axis):
    """Contract the last axis of a [H, R, X] with `axis` of b [H, ...] to f32 [H, R, ...]."""
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions, precision=jax.lax.Precision.HIGHEST)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of a [B, H, R, X] with `axis` of b [B, H, ...] to f32 [B, H, R, ...]."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((3,), (axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
