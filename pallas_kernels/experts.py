"""Products with the weights of experts, one weight [N, K] for each, that read those experts alone that some row chose.

Notation: T rows of activations, C experts that a row chose, all different, E experts in all, N outputs of each, K contracted.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import xla


def hit_by_hit(x: jax.Array, experts: jax.Array, arrays: Mapping[str, jax.Array], run: Callable, e: int, n: int) -> jax.Array:
    """Multiply rows by the weights of the experts that they chose: a product of all rows for each expert that any row chose.

    A row's result is chosen from that of its expert's product, so it depends on others as far as the product itself does.

    Args:
      x: [T, C, K], or [T, 1, K] where all of a row's experts are given the same.
      experts: int32 [T, C], -1 for none, whose result is 0.
      arrays: of all experts' weights; the first dimension of each is E equal parts.
      run: (rows [T, K], arrays of one expert) to f32 [T, N].
      e, n: how many experts there are, and outputs of each.

    Returns:
      f32 [T, C, N].
    """
    hit = jnp.any(experts.reshape(-1, 1) == jnp.arange(e, dtype=jnp.int32)[None], axis=0)
    order = jnp.argsort(~hit)  # those hit before the others
    step = _step(x, experts, arrays, run, e, xla.part)
    return jax.lax.fori_loop(0, jnp.sum(hit, dtype=jnp.int32), lambda i, y: step(order[i], y), _zeros(experts, n))


def each_by_each(x: jax.Array, experts: jax.Array, arrays: Mapping[str, jax.Array], run: Callable, e: int, n: int) -> jax.Array:
    """`hit_by_hit` over all experts, whose derivative can be had."""
    return jax.lax.fori_loop(0, e, _step(x, experts, arrays, run, e, xla.plain_part), _zeros(experts, n))


def _zeros(experts, n):
    return jnp.zeros((*experts.shape, n), jnp.float32)


def _step(x, experts, arrays, run, e, part):
    def step(i, y):
        chosen = (experts == i)[..., None]  # [T, C, 1], of which one at most
        given = x[:, 0] if x.shape[1] == 1 else jnp.sum(jnp.where(chosen, x, 0), axis=1, dtype=x.dtype)
        return jnp.where(chosen, run(given, {role: part(array, i, e) for role, array in arrays.items()})[:, None], y)

    return step
