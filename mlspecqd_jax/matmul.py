"""`linear`: the one place where a weight meets activations.

Layers never look at how a weight is stored; they call `linear(x, w)` and `linear` dispatches on the leaf.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import bf16_matmul


def linear(x: jax.Array, w: jax.Array, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ w.T over the last axis of x, accumulated in f32.

    Args:
      x: activations [..., K].
      w: weight [N, K].
      out_dtype: dtype of the result; None gives x's (the head asks for f32).

    Returns:
      [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    y = bf16_matmul(rows.astype(w.dtype), w)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype or x.dtype)


def implementation(platform: str) -> str:
    """Name what `linear` runs on a platform (cpu, gpu or tpu) for the weights that this version stores."""
    return "XLA dot, at least two rows" if platform == "cpu" else "XLA dot"
