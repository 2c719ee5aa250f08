"""`used` and `experts`: which rows a function in C++ computes, and from which part of a weight.

`used`, int32 [B], says how many rows of each window, from its first on.

M rows are B windows of M / B rows, one after the other. Other rows cost nothing: they are not read, and their results are whatever
was in memory before. A number below 0 counts as 0, one beyond its window as all of it; None is all rows.

`experts`, int32 [M], says whose weight each row is multiplied by, where a weight [E * N, K] is those of E experts, one after
another. A row with another number, such as -1, is computed for none, like one that is not in use.
"""

import jax
import jax.numpy as jnp


def used_of_rows(used: jax.Array | None, m: int) -> jax.Array:
    """Return int32 [B] for M rows, or raise a ValueError that says what it should be."""
    if used is None:
        return jnp.full((1,), m, jnp.int32)
    if used.dtype != jnp.int32 or used.ndim != 1 or (m % len(used) if len(used) else m):
        raise ValueError(f"used is {used.dtype}{list(used.shape)}, but should be int32 [B] for {m} rows, B windows of equal size")
    return used


def used_of_windows(used: jax.Array | None, batch: int, window: int) -> jax.Array:
    """Return int32 [B] for B windows of so many positions, or raise a ValueError that says what it should be."""
    if used is None:
        return jnp.full((batch,), window, jnp.int32)
    if used.dtype != jnp.int32 or used.shape != (batch,):
        raise ValueError(f"used is {used.dtype}{list(used.shape)}, but should be int32 [{batch}], a number for each window")
    return used


def experts_of_rows(experts: jax.Array | None, m: int) -> jax.Array:
    """Return int32 [M], or [0] where there is one weight, or raise a ValueError that says what it should be."""
    if experts is None:
        return jnp.zeros((0,), jnp.int32)
    if experts.dtype != jnp.int32 or experts.shape != (m,):
        raise ValueError(f"experts is {experts.dtype}{list(experts.shape)}, but should be int32 [{m}], a number for each row")
    return experts
