"""Row gathers and window writes that move 16-bit floats, in the form that costs least on each platform.

The XLA:CPU of jax before CONVERTS_BEFORE has no 16-bit float gather or scatter: it converts the whole operand to f32 and back. For
a cache that is three more passes over it in every step, and for an embedding an f32 copy of the table, hoisted out of the
generation loop.

Notation: B batch, H heads, S cache length, W window, D head size, V vocabulary, K hidden size.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

import cpu_kernels

CONVERTS_BEFORE = (0, 11)
NARROW = 16  # positions


def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return table[index] for a table [V, K] and integers of any shape."""

    def gather(table, index):
        return table[index]

    def unhoisted(table, index):
        # With the conversion kept in the loop it fuses into the gather, which then reads the rows alone.
        return gather(*jax.lax.optimization_barrier((table, index)))

    def by_rows(table, index):
        # Else XLA:GPU may lay a single row out as a column, for a kernel that reads it so, and make a transposed table for it.
        found = gather(table, index)
        return with_layout_constraint(found, Layout(tuple(range(found.ndim))))

    on_cpu = unhoisted if _is_converted(table) else gather
    on_gpu = by_rows if jax.sharding.get_abstract_mesh().size < 2 else gather  # the constraint says nothing of how a table is split
    return jax.lax.platform_dependent(table, index, cpu=on_cpu, cuda=on_gpu, default=gather)


def put_window(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Store values [B, H, W, D] in buffer [B, H, S, D] at positions start[r] + 0..W-1; what falls beyond the buffer is dropped."""
    window = values.shape[2]

    def scatter(buffer, start, values):
        # Head-major buffers and one scatter a tensor: XLA updates them in place inside (nested) while loops.
        row = jnp.arange(values.shape[0])[:, None, None]
        head = jnp.arange(values.shape[1])[None, :, None]
        position = start[:, None, None] + jnp.arange(window)[None, None, :]
        return buffer.at[row, head, position].set(values)

    def select(buffer, start, values):
        offset = (jnp.arange(buffer.shape[2])[None, :] - start[:, None])[:, None, :, None]  # [B, 1, S, 1]
        for w in range(window):
            buffer = jnp.where(offset == w, values[:, :, w : w + 1], buffer)
        return buffer

    def in_xla(buffer, start, values):
        # A decode step's window is cheaper in one fused pass over the buffer than in the scatter's three; prompts are wider.
        if _is_converted(buffer) and window <= NARROW:
            return jax.lax.platform_dependent(buffer, start, values, cpu=select, default=scatter)
        return scatter(buffer, start, values)

    return cpu_kernels.on_cpu(cpu_kernels.put_window, in_xla, buffer, start, values, unit="positions")


def _is_converted(x):
    is_short_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return is_short_float and jax.__version_info__ < CONVERTS_BEFORE
