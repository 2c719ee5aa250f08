"""Convolutions over the last few positions, channel by channel, as layers of their own (LFM2) and before a recurrence.

Notation: B batch, W window, K channels, L positions that a convolution sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config, rings
from mlspecqd_jax.network.layers import ALONG_K, ALONG_N, Linear, Window
from mlspecqd_jax.network.ops import product, rounded


class ConvCache(NamedTuple):
    """What one layer convolves, by position: `rings`."""

    inputs: jax.Array  # [B, L - 1 + how many positions may be fed again, K]


class CausalConv(nnx.Module):
    """y[p] = sum over j of weight[:, 0, j] * x[p - L + 1 + j] + bias, with weight [K, 1, L] and zeros before the text."""

    def __init__(self, k: int, length: int, *, bias: bool, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (k, 1, length)))
        self.bias = nnx.Param(jnp.zeros((k,))) if bias else None

    def __call__(self, x: jax.Array, window: Window, cache: ConvCache | None):
        """Return (y f32 [B, W, K], updated cache) of x [B, W, K]; without a cache nothing lies before the window."""
        weight = self.weight.get_value().astype(jnp.float32)
        behind, start = weight.shape[-1] - 1, window.positions[:, 0]
        if cache is None:
            seen = jnp.pad(x, ((0, 0), (behind, 0), (0, 0)))
        else:
            assert window.used is not None, "what a pass over a cache leaves there is told by it"
            seen = rings.seen(cache.inputs, x, start)
            cache = ConvCache(rings.kept(seen, cache.inputs.shape[1], start, window.used))
            positions = start[:, None] + jnp.arange(-cache.inputs.shape[1], x.shape[1], dtype=jnp.int32)[None]
            seen = jnp.where((positions >= 0)[..., None], seen, 0)
        first = seen.shape[1] - x.shape[1] - behind
        total = jnp.zeros(x.shape, jnp.float32)
        for j in range(first, first + behind + 1):  # one order of additions, whatever the window
            total = total + product(seen[:, j : j + x.shape[1]].astype(jnp.float32), weight[None, None, :, 0, j - first])
        return total if self.bias is None else total + self.bias.get_value().astype(jnp.float32)[None, None], cache


class ShortConv(nnx.Module):
    """`config.ShortConv` in place of attention (LFM2, arXiv 2511.23404, section 2)."""

    def __init__(self, c: config.ShortConv, k: int, *, init, rngs: nnx.Rngs):
        self.in_proj = Linear(3 * k, k, bias=c.bias, axes=ALONG_N, init=init, rngs=rngs)
        self.conv = CausalConv(k, c.length, bias=c.bias, init=init, rngs=rngs)
        self.out_proj = Linear(k, k, bias=c.bias, axes=ALONG_K, init=init, rngs=rngs)

    def __call__(self, x: jax.Array, window: Window, cache: ConvCache | None):
        """Return (output [B, W, K], updated cache) of x [B, W, K]."""
        before, after, u = jnp.split(self.in_proj(x, window.used), 3, axis=-1)
        y, cache = self.conv(_product(before, u, x.dtype), window, cache)
        return self.out_proj(_product(after, y, x.dtype), window.used), cache


def _product(x, y, dtype):
    return rounded(x.astype(jnp.float32) * y.astype(jnp.float32), dtype)
