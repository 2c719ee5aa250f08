"""Rings: what a layer needs of each position, for as many of the last positions as may be fed again; position p lies at p mod R.

Like a cache of keys a ring is addressed by absolute position and holds no length: what is fed anew takes the place of what was
there, so that nothing is rolled back. It is read as a whole before a window and made anew after it, of what was read alone, so
that XLA updates it in place.

Notation: B batch, W window, R length of the ring.
"""

import jax
import jax.numpy as jnp


def seen(ring: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """Return what ring [B, R, ...] holds of the R positions before start[r], and values [B, W, ...] behind it, [B, R + W, ...].

    Of positions before the text, and of those further before the last that was ever written than R, it is anything.
    """
    if ring.shape[1] == 0:
        return values
    at = start[:, None] + jnp.arange(-ring.shape[1], 0, dtype=jnp.int32)[None]
    found = ring.at[jnp.arange(len(ring))[:, None], at % ring.shape[1]].get(mode="clip")
    return jnp.concatenate([found, values], axis=1)


def kept(seen: jax.Array, size: int, start: jax.Array, used: jax.Array) -> jax.Array:
    """Return the ring [B, size, ...] after a window, of whose positions start[r] + 0..used[r]-1 hold something.

    Args:
      seen: as the function of that name returns it.
      size: static, R.
      start, used: int32 [B].
    """
    if size == 0:
        return seen[:, :0]
    place, end = jnp.arange(size, dtype=jnp.int32)[None], (start + used)[:, None]
    at = end - 1 - (end - 1 - place) % size - start[:, None]  # in the window, of the last position that has this place
    index = jnp.where(at >= 0, size + at, (place - start[:, None]) % size)  # or else what was there
    # A gather and no scatter, for which XLA:CPU widens 16-bit floats (`xla.put_window`).
    return seen.at[jnp.arange(len(seen))[:, None], index].get(mode="clip")
