"""Sums and softmax over a row, products and casts, by operations of one order and rounding, whatever else the program computes.

XLA:CPU reduces a row in another order, and may compute the exponentials beside the reduction by another formula, once an array has
enough elements (seen at 4,096 and more): with more rows, a window's norms and probabilities would have other bits than a row alone.
Additions that the expression spells out stay as they are.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 256


def ordered_sum(x: jax.Array) -> jax.Array:
    """Return the sum over the last axis of x [..., K], f32 [...], on CPU by additions whose order the expression fixes.

    Zeros at the end change nothing, so neither does the length of a buffer. On TPU and GPU, where windows of one width are computed
    alike, it is XLA's own sum.
    """
    return jax.lax.platform_dependent(x.astype(jnp.float32), cpu=_sum, default=lambda x: jnp.sum(x, axis=-1))


def ordered_softmax(x: jax.Array, sink: jax.Array | None = None) -> jax.Array:
    """Return softmax(x) over the last axis of x f32 [..., K], by `ordered_sum`; a row of -inf alone gives NaN.

    A sink, f32 [...], is one more logit of each row; its probability is left out.
    """
    if sink is None:
        powers, total = _powers(x)
        return powers / total[..., None]
    greatest = jnp.maximum(_greatest(x), jax.lax.stop_gradient(sink))
    powers = jnp.exp(x - greatest[..., None])
    return powers / (ordered_sum(powers) + jnp.exp(sink - greatest))[..., None]


def ordered_logsumexp(x: jax.Array) -> jax.Array:
    """Return log(sum(exp(x))) over the last axis of x f32 [..., K], by `ordered_sum`."""
    _, total = _powers(x)
    return jnp.log(total) + _greatest(x)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, elementwise, to be added to something.

    XLA:CPU would fuse the product with the sum that takes it, for a window of one row otherwise than for others. Bounds that change
    no finite number keep the two apart.
    """
    most = jnp.finfo(x.dtype).max
    return jnp.clip(x * y, -most, most)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return x f32 in `dtype`, and no more of it: XLA may drop a cast and the one back, in one program and not in another."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


def _powers(x):
    powers = jnp.exp(x - _greatest(x)[..., None])
    return powers, ordered_sum(powers)


def _greatest(x):
    # A reduction, even by a maximum, would decide how XLA:CPU computes the exponentials of what it is subtracted from.
    return jax.lax.platform_dependent(jax.lax.stop_gradient(x), cpu=_maximum, default=lambda x: jnp.max(x, axis=-1))


@jax.custom_jvp
def _sum(x):
    return _folded(x, jnp.add, 0)


@_sum.defjvp
def _(primals, tangents):
    return _sum(*primals), jnp.sum(tangents[0], axis=-1)


def _maximum(x):
    return _folded(x, jnp.maximum, -jnp.inf)


def _folded(x, combine, neutral):
    filled = functools.partial(_filled, neutral=neutral)
    x = filled(x, BLOCK)
    x = x.reshape(*x.shape[:-1], -1, BLOCK)
    while x.shape[-1] > 1:  # within a block, halves: two contiguous pieces, which vectorize
        half = x.shape[-1] // 2
        x = combine(x[..., :half], x[..., half:])
    x = x[..., 0]
    while x.shape[-1] > 1:  # of the blocks, neighbours: blocks of neutral elements at the end leave the others where they are
        x = filled(x, 2)
        x = combine(x[..., 0::2], x[..., 1::2])
    return x[..., 0]


def _filled(x, multiple, neutral):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)], constant_values=neutral)
