"""Gather and scatter that leave 16-bit floats as they are on CPU.

XLA:CPU has no 16-bit float gather or scatter: it converts the whole operand to f32 and back, which for a cache means three more
passes over it in every step, and for an embedding an f32 copy held outside the loop. The same bits as integers move as they are.
Elsewhere the plain operations do that already, and the integer view of a table would be a copy.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] for a table [V, K] and integers of any shape; differentiable in the table."""

    def as_integers(table, index):
        return _from_bits(_as_bits(table)[index], table.dtype)

    return jax.lax.platform_dependent(table, index, cpu=as_integers, default=lambda table, index: table[index])


rows.defjvps(lambda tangent, _, table, index: tangent[index], None)


def put(buffer: jax.Array, at: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
    """buffer with values stored at the index arrays `at`; what falls beyond the buffer is dropped. Not differentiable."""

    def as_integers(buffer, at, values):
        return _from_bits(_as_bits(buffer).at[at].set(_as_bits(values), mode="drop"), buffer.dtype)

    def plain(buffer, at, values):
        return buffer.at[at].set(values, mode="drop")

    return jax.lax.platform_dependent(buffer, at, values, cpu=as_integers, default=plain)


def _as_bits(x):
    is_short_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_short_float else x


def _from_bits(x, dtype):
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
