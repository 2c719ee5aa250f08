"""Root mean square norms whose bits depend on their own row alone.

Notation: K is the axis that is normed.
"""

import jax
import jax.numpy as jnp

import cpu_kernels
from mlspecqd_jax.folds import ordered_sum


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, in f32 (Zhang and Sennrich, arXiv 1910.07467).

    Args:
      x: [..., K].
      weight: [K].
      eps: what is added to the mean.
      offset: what is added to the weight, in f32: in 16 bits the sum would lose the weight's low bits.

    Returns:
      [..., K] in x's dtype.
    """

    @jax.custom_jvp
    def in_cpp(x, weight):
        return cpu_kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)

    @in_cpp.defjvp
    def _(primals, tangents):
        return in_cpp(*primals), jax.jvp(in_xla, primals, tangents)[1]

    def in_xla(x, weight):
        y = x.astype(jnp.float32)
        mean = ordered_sum(y * y)[..., None] / x.shape[-1]
        scale = weight.astype(jnp.float32)
        return (y * jax.lax.rsqrt(mean + eps) * (offset + scale if offset else scale)).astype(x.dtype)

    return in_xla(x, weight) if offset else cpu_kernels.on_cpu(in_cpp, in_xla, x, weight)
