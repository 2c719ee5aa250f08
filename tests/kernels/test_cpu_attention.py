"""The C++ attention and the write to the cache: what they compute, and that a row depends on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from windows import assert_rows_in_use, in_use, numbers_in_use

import cpu_kernels
from mlspecqd_jax.network import attention, ops
from mlspecqd_jax.network.config import Norm

pytestmark = pytest.mark.skipif(not cpu_kernels.isas("attention"), reason="needs a C++ compiler")


def heads(*shape, seed=0):
    return jnp.asarray(2 * np.random.RandomState(seed).standard_normal(shape), jnp.bfloat16)


def seen(start, window, slots, width):
    """The slots that a causal window at these positions sees, the last `width` of them: (first, last), int32 [B, W]."""
    last = np.minimum(np.asarray(start)[:, None] + np.arange(window)[None], slots - 1)
    return np.maximum(last - width + 1, 0).astype(np.int32), last.astype(np.int32)


def attention_definition(q, k, v, first, last, sinks=None, scale=None, cap=None):
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = np.einsum("bhwd,bhsd->bhws", q, k.repeat(groups, 1)) * (scale or 1 / np.sqrt(q.shape[3]))
    scores = cap * np.tanh(scores / cap) if cap else scores
    slots = np.arange(k.shape[2])
    visible = (slots >= first[:, None, :, None]) & (slots <= last[:, None, :, None])
    greatest = np.where(visible, scores, -np.inf).max(-1, keepdims=True)
    weights = np.where(visible, np.exp(scores - greatest), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(np.asarray(sinks, np.float64)[None, :, None, None] - greatest)
    return np.einsum("bhws,bhsd->bwhd", weights / total, v.repeat(groups, 1))


# Beyond the usual softmax: other scales, bounded scores, sinks.
KINDS = ({}, {"scale": 0.05}, {"cap": 3.0}, {"scale": 0.4, "cap": 20.0, "sinks": True}, {"sinks": True})


def made(kind, q_heads):
    """The arguments of a kind of attention with a sink for each head, one of which is none."""
    given = dict(kind)
    if given.pop("sinks", False):
        given["sinks"] = heads(q_heads, seed=2).at[0].set(-jnp.inf)
    return given


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("batch", "q_heads", "kv_heads", "window", "slots", "depth", "value_depth"),
    [(1, 32, 4, 2, 70, 64, 64), (2, 6, 3, 5, 37, 10, 13), (1, 8, 2, 19, 50, 24, 16), (2, 4, 4, 1, 7, 6, 6)],
)
def test_attention_is_its_definition(isa, kind, batch, q_heads, kv_heads, window, slots, depth, value_depth):
    q, k, v = (
        heads(batch, q_heads, window, depth),
        heads(batch, kv_heads, slots, depth),
        heads(batch, kv_heads, slots, value_depth, seed=1),
    )
    kind = made(kind, q_heads)
    for width in (slots, 5):
        first, last = seen(np.arange(batch) + slots - window - 1, window, slots, width)
        y = cpu_kernels.attention(q, k, v, first, last, isa=isa, **kind)
        np.testing.assert_allclose(y, attention_definition(q, k, v, first, last, **kind), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_attention_depend_on_nothing_else(isa, kind):
    """Not on the window, on a batch, on how many slots there are, nor on what lies beyond those that a row sees."""
    window, slots, kind = 9, 60, made(kind, 6)
    q, k, v = heads(2, 6, window, 12), heads(2, 3, slots, 12), heads(2, 3, slots, 12, seed=1)
    first, last = seen([30, 41], window, slots, 1000)
    whole = np.asarray(cpu_kernels.attention(q, k, v, first, last, isa=isa, **kind))
    for w in range(window):
        end = int(last[1, w]) + 1
        k_, v_ = (x[1:, :, : end + 3].at[:, :, end:].set(1000) for x in (k, v))
        alone = cpu_kernels.attention(q[1:, :, w : w + 1], k_, v_, first[1:, w : w + 1], last[1:, w : w + 1], isa=isa, **kind)
        np.testing.assert_array_equal(alone[0, 0], whole[1, w])


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
@pytest.mark.parametrize(("batch", "window"), [(1, 9), (3, 5)])
def test_queries_in_use_are_those_of_the_whole_window(isa, batch, window):
    """Whatever the others are, and whatever they would see."""
    slots = 60
    q, k, v = heads(batch, 6, window, 12), heads(batch, 3, slots, 12), heads(batch, 3, slots, 12, seed=1)
    first, last = seen([30, 41, 3][:batch], window, slots, 1000)
    whole = np.asarray(cpu_kernels.attention(q, k, v, first, last, isa=isa))
    for used in numbers_in_use(batch, window):
        rows = in_use(used, window)
        poisoned = jnp.where(rows[:, None, :, None], q, jnp.nan)
        far = np.where(rows, last, 2**31 - 1).astype(np.int32)
        found = np.asarray(cpu_kernels.attention(poisoned, k, v, first, far, isa=isa, used=jnp.asarray(used)))
        np.testing.assert_array_equal(found[rows], whole[rows])


@pytest.mark.parametrize("dtype", cpu_kernels.library.DTYPES)
def test_positions_in_use_are_rotated_and_normed_as_in_the_whole_window(dtype):
    x, weight = heads(3, 6, 4, 10).astype(dtype), heads(10, seed=1).astype(dtype)
    cos, sin = (jax.random.normal(jax.random.key(i), (3, 6, 5)) for i in range(2))
    whole = np.asarray(cpu_kernels.rotate(x, cos, sin))
    normed = np.asarray(ops.rms_norm(x, weight, Norm(1e-5)))
    for used in numbers_in_use(3, 6):
        rows = in_use(used, 6)
        poisoned = jnp.where(rows[:, :, None, None], x, jnp.nan)
        found = np.asarray(cpu_kernels.rotate(poisoned, cos, sin, jnp.asarray(used)))
        np.testing.assert_array_equal(np.moveaxis(found, 1, 2)[rows], np.moveaxis(whole, 1, 2)[rows])
        np.testing.assert_array_equal(np.asarray(ops.rms_norm(poisoned, weight, Norm(1e-5), jnp.asarray(used)))[rows], normed[rows])
    for isa in cpu_kernels.isas("rms_norm", dtype):
        x, weight = np.asarray(heads(18, 70).astype(dtype)), heads(70, seed=1).astype(dtype)
        whole = np.asarray(cpu_kernels.rms_norm(jnp.asarray(x), weight, 1e-5, isa=isa))
        norm = functools.partial(cpu_kernels.rms_norm, weight=weight, eps=1e-5, isa=isa)
        assert_rows_in_use(lambda x, used, norm=norm: norm(jnp.asarray(x), used=used), x, whole)


@pytest.mark.parametrize("isa", cpu_kernels.isas("attention"))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_passes_on_nan(isa, kind):
    kind = made(kind, 2)
    q, k, v = heads(1, 2, 3, 8), heads(1, 2, 20, 8), heads(1, 2, 20, 8, seed=1)
    first, last = seen([10], 3, 20, 1000)
    attend = functools.partial(cpu_kernels.attention, isa=isa, **kind)
    clean = np.asarray(attend(q, k, v, first, last))
    y = np.array(attend(q.at[0, 1, 2, 5].set(jnp.nan), k, v, first, last))
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


@pytest.mark.parametrize("start", [[0, 3, 1], [5, 0, 6], [7, 9, -9], [-2, 4, -1], [2]])
def test_a_window_is_written_and_what_falls_outside_or_is_not_in_use_is_dropped(start):
    batch, put = len(start), jax.jit(cpu_kernels.put_window)
    buffer, values = heads(batch, 3, 8, 5), heads(batch, 3, 4, 5, seed=1)
    for used in (None, *numbers_in_use(batch, 4)):
        expected = np.array(buffer)
        for row, position in enumerate(start):
            for w in range(4 if used is None else min(used[row], 4)):
                if 0 <= position + w < 8:
                    expected[row, :, position + w] = values[row, :, w]
        found = put(buffer, jnp.array(start, jnp.int32), values, used)
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
