"""The forms in which XLA does what is meant: products, gathers and parts of rows, window writes. Each says what it is needed for.

A form is here for a symptom of some version of XLA, and its docstring names the test that fails without it, so that it can be tried
without, and taken out, when a later version does well by itself. All were seen with the XLA of jax 0.10.2.

Notation: M rows of activations, N outputs, K contracted or hidden size, B batch, H heads, S cache length, W window, D head size, V
vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.product import ONE_WIDTH, PLAIN, STORED_AXES, Product, anywhere, as_stored
from pallas_kernels.reference import bf16_matmul, check_decoded_shapes, code_values, decode, unpacked, whole_blocks

CONVERTS_BEFORE = (0, 11)  # the jax whose XLA:CPU has gathers and scatters of 16-bit floats
NARROW = 16  # positions


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`reference.bf16_matmul`, of two rows at least on CPU.

    XLA:CPU (jax 0.10 to 0.12) converts the whole weight to f32 for a one-row product of a 16-bit type: about ten times slower, and
    hoisted out of a loop it doubles or triples the memory. From two rows on it reads the weight as it is.
    Test: tests/kernels/test_xla.py, test_a_row_alone_widens_no_weight.
    """

    def two_rows_at_least(x, w):
        if x.shape[0] == 1 and x.dtype != jnp.float32:
            return bf16_matmul(jnp.concatenate([x, x]), w)[:1]
        return bf16_matmul(x, w)

    return jax.lax.platform_dependent(x, w, cpu=two_rows_at_least, default=bf16_matmul)


def decoded_matmul(x: jax.Array, arrays: Mapping[str, jax.Array], format: Any, product: Callable = matmul) -> jax.Array:
    """x [M, K32] by the values of a weight as it is stored, in x's dtype, with one decoded weight in memory at a time.

    Where a whole row has one scale, its elements are multiplied and the scale comes to the result: they lose nothing in bfloat16.

    XLA hoists decoding out of a generation loop, and XLA:CPU then keeps every decoded weight as f32, eight times the packed bytes:
    a barrier holds it in the loop. XLA:CPU removes barriers before it orders operations, and then decodes the weights of all layers
    first: only data holds each back until its own x is there (jax 0.10 to 0.12).
    Test: tests/network/test_ops.py, test_a_loop_holds_one_decoded_weight.

    Args:
      x: activations, bfloat16, float16 or float32.
      arrays: by role, as `reference.decode`.
      format: as `reference.decode`.
      product: of x and the decoded weight, as `reference.bf16_matmul`.
    """
    check_decoded_shapes(x, arrays, format)

    def after(x, codes):
        # No number has more than 63 bits set, which XLA does not work out.
        bits = jax.lax.bitcast_convert_type(x[0, 0], jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16)
        return codes + (jax.lax.population_count(bits) >> 6).astype(codes.dtype)

    x, arrays = jax.lax.optimization_barrier((x, dict(arrays)))
    held = "codes" if format.group is None else "scales"
    arrays[held] = jax.lax.platform_dependent(x, arrays[held], cpu=after, default=lambda x, array: array)
    if format.group is not None:
        return product(x, decode(arrays, format, x.dtype))
    return product(x, code_values(unpacked(arrays["codes"], format.bits), format.element).astype(x.dtype)) * arrays["scales"].T


def rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return table[index] for a table [V, K] and integers of any shape.

    XLA:CPU before jax 0.11 has no 16-bit float gather: it converts the whole table to f32, and hoists that copy out of the loop.
    With the conversion kept in the loop it fuses into the gather, which then reads the rows alone.
    Test: tests/kernels/test_xla.py, test_rows_widen_no_table.
    XLA:GPU may lay a single row out as a column, for a kernel that reads it so, and makes a transposed table for it.
    Test: tests/compiled/test_aot.py, test_no_weight_is_decoded_in_memory.
    """

    def gather(table, index):
        return table[index]

    def unhoisted(table, index):
        return gather(*jax.lax.optimization_barrier((table, index)))

    def by_rows(table, index):
        found = gather(table, index)
        return with_layout_constraint(found, Layout(tuple(range(found.ndim))))

    on_cpu = unhoisted if _is_converted(table) else gather
    on_gpu = by_rows if jax.sharding.get_abstract_mesh().size < 2 else gather  # the constraint says nothing of how a table is split
    return jax.lax.platform_dependent(table, index, cpu=on_cpu, cuda=on_gpu, default=gather)


def part(array: jax.Array, i: jax.Array, parts: int) -> jax.Array:
    """Return the i-th of equal parts of an array's rows.

    XLA:CPU (jax 0.10 to 0.12) takes the part of 16-bit floats after it has converted them all to f32, and does that before a loop
    that asks for one part after another. Of the same bits as integers it takes the part first.
    Test: tests/kernels/test_experts.py, test_a_part_widens_no_stack.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize != 2:
        return plain_part(array, i, parts)

    def of_bits(array, i):
        bits = jax.lax.bitcast_convert_type(array, jnp.uint16)
        return jax.lax.bitcast_convert_type(plain_part(bits, i, parts), array.dtype)

    return jax.lax.platform_dependent(array, i, cpu=of_bits, default=functools.partial(plain_part, parts=parts))


def plain_part(array: jax.Array, i: jax.Array, parts: int) -> jax.Array:
    """`part` as it is meant, which can be differentiated."""
    size = array.shape[0] // parts
    return jax.lax.dynamic_slice_in_dim(array, i * size, size)


def put_window(buffer: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """Store values [B, H, W, D] in buffer [B, H, S, D] at positions start[r] + 0..W-1; what falls beyond the buffer is dropped.

    Buffers are head-major, and a tensor takes one scatter: XLA updates them in place inside (nested) while loops. XLA:CPU before
    jax 0.11 has no 16-bit float scatter: it converts the whole cache to f32 and back, three more passes over it in every step. One
    fused pass of selects is cheaper for a decode step's window; prompts are wider.
    Test: tests/kernels/test_xla.py, test_a_narrow_window_widens_no_buffer.
    """
    window = values.shape[2]

    def scatter(buffer, start, values):
        row = jnp.arange(values.shape[0])[:, None, None]
        head = jnp.arange(values.shape[1])[None, :, None]
        position = start[:, None, None] + jnp.arange(window)[None, None, :]
        return buffer.at[row, head, position].set(values)

    def select(buffer, start, values):
        offset = (jnp.arange(buffer.shape[2])[None, :] - start[:, None])[:, None, :, None]  # [B, 1, S, 1]
        for w in range(window):
            buffer = jnp.where(offset == w, values[:, :, w : w + 1], buffer)
        return buffer

    if _is_converted(buffer) and window <= NARROW:
        return jax.lax.platform_dependent(buffer, start, values, cpu=select, default=scatter)
    return scatter(buffer, start, values)


def _is_converted(x):
    is_short_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return is_short_float and jax.__version_info__ < CONVERTS_BEFORE


def row_multiple(chip: str, dtype: str) -> int | None:
    """Of `matmul`: on CPU bfloat16 was found alike bit for bit at all even numbers of rows; float16 and float32 not everywhere.

    Elsewhere one padded width is alike by construction.
    """
    return (2 if dtype == "bfloat16" else None) if chip == "cpu" else ONE_WIDTH


def _dot(x, arrays, *, n, chip, format, interpret, used=None):
    return matmul(x.astype(arrays["weight"].dtype), arrays["weight"])


def _decoded(x, arrays, *, n, chip, format, interpret, used=None):
    return decoded_matmul(whole_blocks(x), arrays, format)


DOT = Product("dot", (PLAIN,), anywhere, as_stored, {"weight": ("n", "k")}, _dot, row_multiple)
DECODED = Product("decoded", None, anywhere, as_stored, STORED_AXES, _decoded, row_multiple)
