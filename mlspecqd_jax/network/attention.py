"""Attention over a functional cache that is indexed by absolute position.

Notation: B batch, W window, S cache length, H query heads, Hkv key/value heads, D size of a query's and a key's head, Dv of a
value's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import ordered_softmax


class KVCache(NamedTuple):
    """Keys and values of one layer, indexed by absolute position; it carries no length."""

    k: jax.Array  # [B, Hkv, S, D]
    v: jax.Array | None  # [B, Hkv, S, Dv], None where the keys are the values too


class ExpertsRead(NamedTuple):
    """What a mixture's cache holds after those of its layers: how many experts' weights a layer has read so far, on average."""

    total: jax.Array  # f32 [], added up over passes


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


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of a [B, H, R, X] with `axis` of b [B, H, ...] to f32 [B, H, R, ...]."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((3,), (axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
