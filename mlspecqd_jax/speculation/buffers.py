"""Reading and writing rows of a buffer at a position of each row's own.

Notation: B batch, S buffer length, n positions.
"""

import jax
import jax.numpy as jnp

from mlspecqd_jax.speculation.protocols import PADDING

SLACK = 64  # positions beyond the last token, for the window of one round of any level


def write_at(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Write values [B, n, ...] into buffer [B, S, ...] at start[r] + 0..n-1; what falls beyond the buffer is dropped."""
    row = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[row, start[:, None] + jnp.arange(values.shape[1])[None, :]].set(values, mode="drop")


def read_at(buffer: jax.Array, start: jax.Array, n: int) -> jax.Array:
    """Return buffer [B, S, ...] at start[r] + 0..n-1, [B, n, ...]; beyond the buffer its last entry is repeated."""
    row = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[row, start[:, None] + jnp.arange(n)[None, :]].get(mode="clip")


def padded(tokens: jax.Array, start: jax.Array, known: jax.Array) -> jax.Array:
    """Return a window, tokens [B, W] at positions start[r] + 0..W-1, with `PADDING` from position known[r] on."""
    position = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    return jnp.where(position < known[:, None], tokens, PADDING)


def filled(x: jax.Array, n: int) -> jax.Array:
    """Return x [B, at most n, ...] with zeros behind it, [B, n, ...]."""
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1]), *(((0, 0),) * (x.ndim - 2))))
