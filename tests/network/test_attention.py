"""Attention against its formula, in values and derivatives, and the cache that it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from recorded import error

from mlspecqd_jax.network.attention import KVCache
from mlspecqd_jax.network.ops import attend, write


def test_extreme_scores_stay_finite():
    """Scores of a bfloat16 model may reach thousands; softmax in f32 with the maximum taken out must not overflow."""
    q = np.full((1, 2, 3, 4), 200.0, jnp.bfloat16)
    k = np.array([200.0, 200.0, -200.0], jnp.bfloat16)[None, None, :, None].repeat(4, axis=3)
    v = np.arange(12).astype(jnp.bfloat16).reshape(1, 1, 3, 4)
    first, last = np.zeros((1, 3), np.int32), np.arange(3, dtype=np.int32)[None]
    out = quick_jit(attend)(q, k, v, first, last).astype(jnp.float32)
    expected = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [2, 3, 4, 5]])
    np.testing.assert_allclose(out, np.concatenate([expected, expected], axis=1)[None])


@pytest.mark.parametrize(
    ("scale", "cap", "sinks", "size"),
    [
        (None, None, False, 10),
        (0.7, None, False, 10),
        (None, 0.8, False, 10),
        (None, None, True, 10),
        (None, None, False, 7),
        (0.7, 0.8, True, 7),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_its_formula(monkeypatch, platform, scale, cap, sinks, size):
    """The CPU contracts in a layout of its own; what accelerators run must be the same function."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    random, slots = np.random.RandomState(2), 300 if cap else 9  # of more than one block
    q, k, v = (random.standard_normal(n).astype(np.float32) for n in ((2, 6, 4, 10), (2, 3, slots, 10), (2, 3, slots, size)))
    sinks = random.standard_normal(6).astype(np.float32) if sinks else None
    last = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32) + slots - 9
    first = np.maximum(last - 5, 0)
    first[1] = last[1] - 20  # a window that begins before the buffer, or in a block before the last
    expected = np.zeros((2, 4, 6, size))
    for row, window, head in np.ndindex(2, 4, 6):
        seen = slice(max(first[row, window], 0), last[row, window] + 1)
        scores = k[row, head // 2, seen] @ q[row, head, window] * (scale or 1 / np.sqrt(10))
        weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
        expected[row, window, head] = weights / total @ v[row, head // 2, seen]
    run = functools.partial(attend, scale=scale, cap=cap)
    arguments = (q, k, v, first, last, sinks)
    ours = quick_jit(lambda *arguments: run(*arguments))(*arguments)
    assert error(ours, expected.reshape(2, 4, -1)) <= 1e-5


def test_attention_has_the_derivatives_of_its_formula():
    random = np.random.RandomState(2)
    q, k, v = (random.standard_normal(n).astype(np.float32) for n in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    last = np.array([[2, 3, 4]], np.int32)

    def plain(q, k, v, sinks):
        scores = 2.0 * jnp.tanh(jnp.einsum("bhwd,bgsd->bhws", q, k) * 0.7 / 2.0)
        weights = jnp.exp(jnp.where(jnp.arange(5)[None, None, :] <= last[..., None], scores, -jnp.inf))
        total = weights.sum(-1) + jnp.exp(sinks)[None, :, None]
        return jnp.sum(jnp.sin(jnp.einsum("bhws,bgsd->bwhd", weights / total[..., None], v)))

    def ours(q, k, v, sinks):
        out = attend(q, k, v, np.zeros_like(last), last, sinks, scale=0.7, cap=2.0)
        return jnp.sum(jnp.sin(out.reshape(1, 3, 2, 4)))

    arguments = (q, k, v, np.array([0.3, -0.2], np.float32))
    for found, expected in zip(*(quick_jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*arguments) for f in (ours, plain)), strict=True):
        assert error(found, expected) <= 1e-4


def test_write_puts_each_row_at_its_own_positions():
    cache = KVCache(jnp.zeros((2, 1, 6, 1)), jnp.zeros((2, 1, 6, 1)))
    values = jnp.arange(1.0, 5).reshape(2, 1, 2, 1)
    k, v = write(cache, values, 10 * values, jnp.array([1, 4]))
    np.testing.assert_array_equal(k[:, 0, :, 0], [[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 3, 4]])
    np.testing.assert_array_equal(v, 10 * k)
