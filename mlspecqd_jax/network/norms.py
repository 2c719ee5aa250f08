"""Norms whose bits depend on their own row alone.

Notation: K is the axis that is normed.
"""

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import ordered_sum
from mlspecqd_jax.network.config import Norm


def rms_norm(x: jax.Array, weight: jax.Array, norm: Norm) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, in f32 (Zhang and Sennrich, arXiv 1910.07467).

    Args:
      x: [..., K].
      weight: [K].
      norm: its eps, and its offset, which is added in f32: in 16 bits the sum would lose the weight's low bits.

    Returns:
      [..., K] in x's dtype.
    """
    y = x.astype(jnp.float32)
    mean = ordered_sum(y * y)[..., None] / x.shape[-1]
    scale = jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return (y * jax.lax.rsqrt(mean + norm.eps) * (norm.offset + scale if norm.offset else scale)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, norm: Norm) -> jax.Array:
    """y / sqrt(mean(y^2) + eps) * (offset + weight) + bias with y = x - mean(x), in f32 (Ba et al., arXiv 1607.06450).

    Args:
      x: [..., K].
      weight, bias: [K].
      norm: as of `rms_norm`.

    Returns:
      [..., K] in x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y - ordered_sum(y)[..., None] / x.shape[-1]
    mean = ordered_sum(y * y)[..., None] / x.shape[-1]
    scale, shift = (jnp.expand_dims(row.astype(jnp.float32), range(x.ndim - 1)) for row in (weight, bias))
    return (y * jax.lax.rsqrt(mean + norm.eps) * (norm.offset + scale if norm.offset else scale) + shift).astype(x.dtype)
