"""Products with the weights of experts, one weight [N, K] for each, that read those experts alone that some row chose.

Notation: T rows of activations, C experts that a row chose, all different, E experts in all, N outputs of each, K contracted.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import xla


class Hits(NamedTuple):
    """Which experts some row chose."""

    order: jax.Array  # int32 [E], their numbers first, ascending, and then those of the others
    count: jax.Array  # int32 [], how many they are


def hits(experts: jax.Array, e: int) -> Hits:
    """Return which of E experts are among int32 [T, C]; -1 is none."""
    hit = jnp.any(experts.reshape(-1, 1) == jnp.arange(e, dtype=jnp.int32)[None], axis=0)
    return Hits(jnp.argsort(~hit).astype(jnp.int32), jnp.sum(hit, dtype=jnp.int32))


class Slots(NamedTuple):
    """The experts that rows chose, as many as they can choose at most, S."""

    order: jax.Array  # int32 [S], as of `Hits`
    place: jax.Array  # int32 [S, T], which of a row's C experts is that one, -1 where it is none


def slots(experts: jax.Array, e: int) -> Slots:
    """Return where each of the experts that were hit is among int32 [T, C]; -1 is none."""
    order = hits(experts, e).order[: min(e, experts.size)]
    found = experts[None] == order[:, None, None]  # [S, T, C]
    return Slots(order, jnp.where(jnp.any(found, axis=2), jnp.argmax(found, axis=2).astype(jnp.int32), -1))


def chunk_by_chunk(run: Callable, x: jax.Array, experts: jax.Array, arrays: dict[str, jax.Array], rows: int) -> jax.Array:
    """Return run(x, experts, arrays), f32 [T, C, N], of so many rows of x [T, C, K] and experts [T, C] at a time."""
    t, chosen = experts.shape
    if t <= rows:
        return run(x, experts, arrays)
    chunks = -(-t // rows)
    x = jnp.pad(x, ((0, chunks * rows - t), (0, 0), (0, 0))).reshape(chunks, rows, *x.shape[1:])
    experts = jnp.pad(experts, ((0, chunks * rows - t), (0, 0)), constant_values=-1).reshape(chunks, rows, chosen)
    y = jax.lax.map(lambda chunk: run(*chunk, arrays), (x, experts))
    return y.reshape(chunks * rows, chosen, -1)[:t]


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
    order, count = hits(experts, e)
    step = _step(x, experts, arrays, run, e, xla.part)
    return jax.lax.fori_loop(0, count, lambda i, y: step(order[i], y), _zeros(experts, n))


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
