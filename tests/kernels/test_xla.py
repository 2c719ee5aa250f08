"""The forms of `pallas_kernels.xla`: the values of the plain ones, and programs on CPU without what those would cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import cache_copies, widened

from pallas_kernels import bf16_matmul, xla

N, K = 88, 32
VERSION = jax.__version_info__


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.RandomState(sum(shape)).standard_normal(shape), dtype)


def in_a_loop(product):
    """HLO of a loop that multiplies one row with the same weights in every step."""

    def run(x, up, down):
        def body(carry):
            i, x = carry
            return i + 1, product(product(x, up).astype(x.dtype), down).astype(x.dtype)

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, x))[1]

    return jax.jit(run).lower(normal(1, K), normal(N, K), normal(K, N)).compile().as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_product_is_its_definition(rows, dtype):
    x, w = normal(rows, K, dtype=dtype), normal(N, K, dtype=dtype)
    found = jax.jit(xla.matmul)(x, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jax.jit(bf16_matmul)(x, w), rtol=1e-5, atol=1e-5)


def test_a_row_alone_widens_no_weight():
    assert not widened(in_a_loop(xla.matmul), {(N, K)})


def test_a_row_alone_is_still_widened_by_the_plain_product():
    """Where this fails, XLA:CPU has learnt it, and `xla.matmul` can become the plain product from that version on."""
    assert widened(in_a_loop(bf16_matmul), {(N, K)})


def gathered(rows):
    """HLO of a loop that reads two rows of a table in every step."""

    def run(table, index):
        def body(carry):
            i, index, total = carry
            found = rows(table, index)
            return i + 1, (index + 1) % N, total + found

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, index, jnp.zeros((2, K), jnp.bfloat16)))[2]

    return jax.jit(run).lower(normal(N, K), jnp.array([3, 5])).compile().as_text()


def test_rows_are_those_of_the_table():
    table, index = normal(N, K), jnp.array([[3, 5, 3], [0, N - 1, 2]])
    np.testing.assert_array_equal(jax.jit(xla.rows)(table, index), np.asarray(table)[np.asarray(index)])


def test_rows_widen_no_table():
    assert not widened(gathered(xla.rows), {(N, K)})


@pytest.mark.skipif(VERSION >= xla.CONVERTS_BEFORE, reason="XLA:CPU has a gather of 16-bit floats from here on")
def test_a_plain_gather_widens_the_table():
    assert widened(gathered(lambda table, index: table[index]), {(N, K)})


BATCH, HEADS, SLOTS, DEPTH = 2, 3, 41, 12


def written(put, window):
    """HLO of a loop that writes a window in every step."""

    def run(buffer, start, values):
        def body(carry):
            i, buffer = carry
            return i + 1, put(buffer, start + i, values * i.astype(values.dtype))

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, buffer))[1]

    arguments = normal(BATCH, HEADS, SLOTS, DEPTH), jnp.array([3, 7]), normal(BATCH, HEADS, window, DEPTH)
    return jax.jit(run, donate_argnums=0).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [1, 5, 20])
def test_a_window_is_written_and_what_falls_beyond_is_dropped(window, dtype):
    buffer, values = normal(BATCH, HEADS, SLOTS, DEPTH, dtype=dtype), normal(BATCH, HEADS, window, DEPTH, dtype=dtype)
    start = np.array([3, SLOTS - 2])
    expected = np.asarray(buffer).copy()
    for row, first in enumerate(start):
        fits = min(window, SLOTS - first)
        expected[row, :, first : first + fits] = np.asarray(values)[row, :, :fits]
    np.testing.assert_array_equal(jax.jit(xla.put_window)(buffer, jnp.asarray(start), values), expected)


def test_a_narrow_window_widens_no_buffer():
    assert not cache_copies(written(xla.put_window, 5), (BATCH, HEADS, SLOTS, DEPTH))


@pytest.mark.skipif(VERSION >= xla.CONVERTS_BEFORE, reason="XLA:CPU has a scatter of 16-bit floats from here on")
def test_a_plain_scatter_widens_the_buffer():
    def scatter(buffer, start, values):
        position = start[:, None, None] + jnp.arange(values.shape[2])[None, None, :]
        return buffer.at[jnp.arange(BATCH)[:, None, None], jnp.arange(HEADS)[None, :, None], position].set(values)

    assert cache_copies(written(scatter, 5), (BATCH, HEADS, SLOTS, DEPTH))
