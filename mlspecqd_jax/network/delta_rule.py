"""The gated delta rule over a state that no mask takes back: a checkpoint at a position, and a ring of what positions since add.

A window may begin at any position that is not before the checkpoint. What lies between is taken from the ring and folded into the
state anew, then the window's own positions, one after another and in no other form, so that a state has the same bits however a
text was cut into windows. The checkpoint goes on to the last position that nobody may take back (contract C15). A fold reads no
weights: a twin that shares a cache leaves the checkpoint that its verifier would.

Notation: B batch, W window, R positions that may be fed again, G key heads, D their size, H value heads of each, E the size of all
of these.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlspecqd_jax.folds import ordered_sum
from mlspecqd_jax.network import rings
from mlspecqd_jax.network.ops import product


class Added(NamedTuple):
    """What positions do to the state, with * for W or R."""

    keys: jax.Array  # [B, *, G, D]
    values: jax.Array  # [B, *, G, E]
    decay: jax.Array  # f32 [B, *, G, H], what the state is multiplied by
    rate: jax.Array  # f32 [B, *, G, H], how much of what the state says of the key is replaced


class DeltaState(NamedTuple):
    """The state before a position of each row, and what came after it."""

    state: jax.Array  # f32 [B, G, D, E]
    position: jax.Array  # int32 [B]
    ring: Added  # of R positions


def empty(batch: int, groups: int, key_dim: int, heads: int, value_dim: int, reach: int, dtype: jax.typing.DTypeLike) -> DeltaState:
    """Return the state before a text, of so many value heads [value_dim] for each of `groups` key heads [key_dim]."""

    def zeros(size, dtype):
        return jnp.zeros((batch, reach, groups, size), dtype)

    ring = Added(zeros(key_dim, dtype), zeros(heads * value_dim, dtype), *(zeros(heads, jnp.float32) for _ in range(2)))
    return DeltaState(jnp.zeros((batch, groups, key_dim, heads * value_dim), jnp.float32), jnp.zeros((batch,), jnp.int32), ring)


class Asked(NamedTuple):
    """What is asked of the state behind positions."""

    queries: jax.Array  # f32 [B, W, G, D]
    likeness: jax.Array  # f32 [B, W, G], their products with the positions' own keys


def asked(queries: jax.Array, keys: jax.Array) -> Asked:
    """Return what is asked of the state by queries [B, W, G, D] of positions with these keys."""
    queries = queries.astype(jnp.float32)
    return Asked(queries, ordered_sum(product(queries, keys.astype(jnp.float32))))


def step(state: jax.Array, added: Added, of: Asked) -> tuple[jax.Array, jax.Array]:
    """S' = g S + k (rate (v - (g S)^T k))^T, and what it says of the query, S'^T q (Yang et al., arXiv 2412.06464, section 3.1).

    Args:
      state: S, f32 [B, G, D, E].
      added: of one position, without its axis.
      of: the same.

    Returns:
      (S', f32 [B, G, E]).
    """
    key, value = added.keys.astype(jnp.float32), added.values.astype(jnp.float32)
    decay, rate = (jnp.repeat(x, value.shape[-1] // x.shape[-1], axis=-1) for x in (added.decay, added.rate))  # [B, G, E]
    both = jnp.stack([key, of.queries], axis=2)  # [B, G, 2, D], so that the state is read once for both
    axes = (((3,), (2,)), ((0, 1), (0, 1)))
    said = jax.lax.dot_general(both, state, axes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    said = product(said, decay[:, :, None])
    change = product(rate, value - said[:, :, 0])
    new = product(state, decay[:, :, None]) + product(key[..., None], change[:, :, None])
    return new, said[:, :, 1] + product(of.likeness[..., None], change)


def run(added: Added, of: Asked) -> jax.Array:
    """Return what the state says at positions that begin a text, f32 [B, W, G, E]; differentiable."""
    batch, _, groups, dim = added.keys.shape
    state = jnp.zeros((batch, groups, dim, added.values.shape[-1]), jnp.float32)
    along = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (added, of))
    return jnp.swapaxes(jax.lax.scan(lambda state, at: step(state, *at), state, along)[1], 0, 1)


def replay(
    added: Added, of: Asked, cache: DeltaState, start: jax.Array, used: jax.Array, outermost: bool
) -> tuple[jax.Array, DeltaState]:
    """Return what the state says at a window's positions, f32 [B, W, G, E], and the updated cache.

    Args:
      added, of: of the window.
      cache: whose position and ring cover what lies before the window.
      start: int32 [B], the position of each row's first; NaN is what is said of rows whose start the cache does not reach.
      used: int32 [B], how many of the window's positions hold a token; the others change nothing.
      outermost: static, whether no later window begins before this one, so that the checkpoint may go on to its start.
    """
    (batch, reach), width, row = cache.ring.keys.shape[:2], added.keys.shape[1], jnp.arange(len(start))
    end = jnp.where(used > 0, start + used, cache.position)
    taken_back = jnp.minimum(used, reach) if outermost else reach
    until = jnp.maximum(cache.position, end - taken_back)  # where the checkpoint goes
    seen = jax.tree.map(lambda ring, new: rings.seen(ring, new, start), cache.ring, added)  # [B, R + W, ...]

    def fold(at, stop, state):
        """Add position at[r] to the state, where it lies before stop[r]."""
        one = jax.tree.map(lambda x: x[row, jnp.clip(at - start + reach, 0, reach + width - 1)], seen)
        here = (at < stop)[:, None, None]
        one = Added(*(jnp.where(here, x, neutral).astype(x.dtype) for x, neutral in zip(one, (0, 0, 1, 0), strict=True)))
        return step(state, one, jax.tree.map(lambda x: x[row, jnp.clip(at - start, 0, width - 1)], of))

    def fold_all(first, stop, state, said, begun=0):
        def body(i, carry):
            state, new = fold(first + i, stop, carry[0])
            return state, jax.lax.dynamic_update_index_in_dim(carry[1], new, i, 0)

        return jax.lax.fori_loop(begun, jnp.max(stop - first), body, (state, said))

    longest = max(width, reach)  # of what is folded before the checkpoint
    shape = (batch, *added.values.shape[2:])
    state, said = fold_all(cache.position, until, cache.state, jnp.zeros((longest, *shape), jnp.float32))
    if reach:  # the first step leaves the checkpoint where it is, so that no loop begins with a copy of it
        working, first = fold(until, end, state)
        later = jnp.zeros((reach, *shape), jnp.float32).at[0].set(first)
        said = jnp.concatenate([said, fold_all(until, end, working, later, begun=1)[1]])
    at = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    nth = jnp.where(at < until[:, None], at - cache.position[:, None], longest + at - until[:, None])
    said = said.at[nth, row[:, None]].get(mode="clip")  # [B, W, G, E]
    reached = (start >= cache.position) & (start <= cache.position + reach)
    said = jnp.where(reached[:, None, None, None], said, jnp.nan)
    ring = jax.tree.map(lambda x: rings.kept(x, reach, start, used), seen)
    return said, DeltaState(state, until, ring)
