"""The C++ attention and the write to the cache: what they compute, and that a row depends on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from mlspecqd_jax.network import attention, ops

pytestmark = pytest.mark.skipif(not cpu_kernels.isas("attention"), reason="needs a C++ compiler")


def heads(*shape, seed=0):
    return jnp.asarray(2 * np.random.RandomState(seed).standard_normal(shape), jnp.bfloat16)


def seen(start, window, slots, width):
    """The slots that a causal window at these positions sees, the last `width` of them: (first, last), int32 [B, W]."""
    last = np.minimum(np.asarray(start)[:, None] + np.arange(window)[None], slots - 1)
    return np.maximum(last - width + 1, 0).astype(np.int32), last.astype(np.int32)


def attention_definition(q, k, v, first, last):
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = np.einsum("bhwd,bhsd->bhws", q, k.repeat(groups, 1)) / np.sqrt(q.shape[3])
    slots = np.arange(k.shape[2])
    visible = (slots >= first[:, None, :, None]) & (slots <= last[:, None, :, None])
    weights = np.where(visible, np.exp(scores - np.where(visible, scores, -np.inf).max(-1, keepdims=True)), 0)
    return np.einsum("bhws,bhsd->bwhd", weights / weights.sum(-1, keepdims=True), v.repeat(groups, 1))


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
@pytest.mark.parametrize(
    ("batch", "q_heads", "kv_heads", "window", "slots", "depth"),
    [(1, 32, 4, 2, 70, 64), (2, 6, 3, 5, 37, 10), (1, 8, 2, 19, 50, 24), (2, 4, 4, 1, 7, 6)],
)
def test_attention_is_its_definition(isa, batch, q_heads, kv_heads, window, slots, depth):
    q, k, v = (
        heads(batch, q_heads, window, depth),
        heads(batch, kv_heads, slots, depth),
        heads(batch, kv_heads, slots, depth, seed=1),
    )
    for width in (slots, 5):
        first, last = seen(np.arange(batch) + slots - window - 1, window, slots, width)
        y = cpu_kernels.attention(q, k, v, first, last, isa)
        np.testing.assert_allclose(y, attention_definition(q, k, v, first, last), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
def test_rows_of_attention_depend_on_nothing_else(isa):
    """Not on the window, on a batch, on how many slots there are, nor on what lies beyond those that a row sees."""
    window, slots = 9, 60
    q, k, v = heads(2, 6, window, 12), heads(2, 3, slots, 12), heads(2, 3, slots, 12, seed=1)
    first, last = seen([30, 41], window, slots, 1000)
    whole = np.asarray(cpu_kernels.attention(q, k, v, first, last, isa))
    for w in range(window):
        end = int(last[1, w]) + 1
        k_, v_ = (x[1:, :, : end + 3].at[:, :, end:].set(1000) for x in (k, v))
        alone = cpu_kernels.attention(q[1:, :, w : w + 1], k_, v_, first[1:, w : w + 1], last[1:, w : w + 1], isa)
        np.testing.assert_array_equal(alone[0, 0], whole[1, w])


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
def test_attention_passes_on_nan(isa):
    q, k, v = heads(1, 2, 3, 8), heads(1, 2, 20, 8), heads(1, 2, 20, 8, seed=1)
    first, last = seen([10], 3, 20, 1000)
    clean = np.asarray(cpu_kernels.attention(q, k, v, first, last, isa))
    y = np.array(cpu_kernels.attention(q.at[0, 1, 2, 5].set(jnp.nan), k, v, first, last, isa))
    assert np.isnan(y[0, 2, 1]).all()
    y[0, 2, 1] = clean[0, 2, 1]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.slow
def test_the_tangent_is_that_of_the_formula():
    q, k, v = heads(1, 4, 3, 8), heads(1, 2, 20, 8), heads(1, 2, 20, 8, seed=1)
    first, last = seen([10], 3, 20, 1000)

    def total(attend):
        return jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, first, last).astype(jnp.float32) ** 2), argnums=(0, 1, 2))(q, k, v)

    for ours, expected in zip(total(ops.attend), total(functools.partial(attention.attend, scale=8**-0.5)), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), expected.astype(np.float32), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("start", [[0, 3], [5, 0], [7, 9], [-2, 4]])
def test_a_window_is_written_and_what_falls_outside_is_dropped(start):
    buffer, values = heads(2, 3, 8, 5), heads(2, 3, 4, 5, seed=1)
    expected = np.array(buffer)
    for row, position in enumerate(start):
        for w in range(4):
            if 0 <= position + w < 8:
                expected[row, :, position + w] = values[row, :, w]
    found = jax.jit(cpu_kernels.put_window)(buffer, jnp.array(start, jnp.int32), values)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_window_is_written_in_place():
    """A loop over a donated buffer holds one buffer, and no copy of it."""

    def loop(buffer, values):
        return jax.lax.fori_loop(0, 5, lambda i, b: cpu_kernels.put_window(b, jnp.full((1,), i, jnp.int32), values), buffer)

    buffer, values = jnp.zeros((1, 2, 4096, 16), jnp.bfloat16), heads(1, 2, 1, 16)
    compiled = jax.jit(loop, donate_argnums=0).lower(buffer, values).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= buffer.nbytes
    assert memory.temp_size_in_bytes < buffer.nbytes
    assert " copy(bf16[1,2,4096,16]" not in compiled.as_text().replace("%", "")
    np.testing.assert_array_equal(np.asarray(compiled(buffer, values))[:, :, 4:6], np.concatenate([values, 0 * values], axis=2))
