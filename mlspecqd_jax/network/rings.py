"""Rings: what a layer needs of each position, for as many of the last positions as may be fed again; position p lies at p mod R.

Like a cache of keys it is addressed by absolute position and holds no length: what is fed anew overwrites what was there, so that
nothing is rolled back.

Notation: B batch, W window, R length of the ring, n positions.
"""

import jax
import jax.numpy as jnp


def read(ring: jax.Array, first: jax.Array, n: int) -> jax.Array:
    """Return what ring [B, R, ...] holds of positions first[r] + 0..n-1, [B, n, ...]; zeros of those before the text.

    Args:
      ring: of at least n positions.
      first: int32 [B].
      n: static; of these positions none may lie more than R before the last that was written.
    """
    if n == 0:
        return ring[:, :0]
    at = first[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
    found = ring.at[jnp.arange(len(ring))[:, None], at % ring.shape[1]].get(mode="clip")
    return jnp.where(_along(at >= 0, found), found, 0)


def write(ring: jax.Array, values: jax.Array, start: jax.Array, used: jax.Array) -> jax.Array:
    """Store values [B, W, ...] of positions start[r] + 0..used[r]-1 in ring [B, R, ...], as many of the last as it holds.

    A choice for each of its places and no scatter, for which XLA:CPU widens 16-bit floats (`xla.put_window`).
    """
    if ring.shape[1] == 0:
        return ring
    place = jnp.arange(ring.shape[1], dtype=jnp.int32)[None]
    end = (start + used)[:, None]
    at = end - 1 - (end - 1 - place) % ring.shape[1] - start[:, None]  # in the window, of the last position that has this place
    new = values.at[jnp.arange(len(values))[:, None], jnp.clip(at, 0, values.shape[1] - 1)].get(mode="clip")
    return jnp.where(_along((at >= 0) & (used > 0)[:, None], ring), new, ring)


def _along(flags, x):
    return flags.reshape(*flags.shape, *(1,) * (x.ndim - 2))
