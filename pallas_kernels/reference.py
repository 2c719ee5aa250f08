"""Matrix products in plain jnp: the definition that every kernel is compared with, and the form that runs where none applies.

Notation: M rows of activations, N outputs, K contracted. Weights are [N, K], K last.
"""

import jax
import jax.numpy as jnp


def bf16_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T with f32 accumulation and an f32 result.

    Args:
      x: activations [M, K], in the weight's dtype (bfloat16, float16 or float32).
      w: weight [N, K].

    Returns:
      f32 [M, N].
    """
    return jax.lax.platform_dependent(x, w, cpu=_two_rows_at_least, default=_product)


def _product(x, w):
    # Float32 weights are asked for when exactness matters more than speed, so the reduced-precision passes
    # that TPUs and GPUs use by default for f32 products are switched off.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _two_rows_at_least(x, w):
    # XLA:CPU converts the whole weight to f32 for a one-row product of a 16-bit type (about ten times slower, and
    # hoisted out of a loop it doubles or triples the memory); from two rows on it reads the weight as it is.
    if x.shape[0] == 1 and x.dtype != jnp.float32:
        return _product(jnp.concatenate([x, x]), w)[:1]
    return _product(x, w)
