"""Gated DeltaNet in place of attention (Yang et al., arXiv 2412.06464; as Qwen3-Next has it).

Notation: B batch, W window, K hidden size, G key heads, H value heads, C channels of the convolution before the recurrence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.folds import ordered_sum
from mlspecqd_jax.network import config, delta_rule
from mlspecqd_jax.network.delta_rule import Added, DeltaState
from mlspecqd_jax.network.layers import ACTIVATIONS, ALONG_K, ALONG_N, Linear, RMSNorm, Window
from mlspecqd_jax.network.ops import linear, rounded
from mlspecqd_jax.network.short_conv import CausalConv, ConvCache

EPSILON = 1e-6  # of the length by which queries and keys are divided


class DeltaCache(NamedTuple):
    """What one layer keeps."""

    conv: ConvCache
    delta: DeltaState


def empty(d: config.DeltaNet, batch: int, reach: int, dtype: jax.typing.DTypeLike) -> DeltaCache:
    """Return the cache before a text."""
    channels = 2 * d.key_heads * d.key_dim + d.heads * d.value_dim
    inputs = jnp.zeros((batch, d.conv - 1 + reach, channels), dtype)
    delta = delta_rule.empty(batch, d.key_heads, d.key_dim, d.heads // d.key_heads, d.value_dim, reach, dtype)
    return DeltaCache(ConvCache(inputs), delta)


class Gate(nnx.Module):
    """x @ weight.T in f32, one number for each head, with weight [H, K], which no twin casts."""

    def __init__(self, heads: int, k: int, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (heads, k)), axes=ALONG_N)

    def __call__(self, x: jax.Array, used: jax.Array | None) -> jax.Array:
        return linear(x, self.weight.get_value(), used=used, out_dtype=jnp.float32)


class DeltaNet(nnx.Module):
    """`config.DeltaNet`."""

    def __init__(self, d: config.DeltaNet, k: int, *, init, rngs: nnx.Rngs):
        self.d = d
        keys, values = d.key_heads * d.key_dim, d.heads * d.value_dim
        self.in_proj_q, self.in_proj_k, self.in_proj_v, self.in_proj_z = (
            Linear(n, k, axes=ALONG_N, init=init, rngs=rngs) for n in (keys, keys, values, values)
        )
        self.in_proj_b, self.in_proj_a = (Gate(d.heads, k, init=init, rngs=rngs) for _ in range(2))
        self.conv1d = CausalConv(2 * keys + values, d.conv, bias=False, init=init, rngs=rngs)
        self.A_log = nnx.Param(jnp.zeros((d.heads,)), dtype="float32")
        self.dt_bias = nnx.Param(jnp.ones((d.heads,)), dtype="float32")
        self.norm = RMSNorm(d.value_dim, d.norm)
        self.out_proj = Linear(k, values, axes=ALONG_K, init=init, rngs=rngs)

    def __call__(self, x: jax.Array, window: Window, cache: DeltaCache | None):
        """Return (output [B, W, K], updated cache) of x [B, W, K]; without a cache the window begins the text."""
        (batch, width, _), used, d = x.shape, window.used, self.d
        given = jnp.concatenate([self.in_proj_q(x, used), self.in_proj_k(x, used), self.in_proj_v(x, used)], axis=-1)
        mixed, conv = self.conv1d(given, window, None if cache is None else cache.conv)
        added, asked = self._added(x, rounded(ACTIVATIONS[d.act](mixed), x.dtype), used)
        if cache is None or conv is None:
            said = delta_rule.run(added, asked)
        else:
            assert used is not None, "what a pass over a cache leaves there is told by it"
            said, delta = delta_rule.replay(added, asked, cache.delta, window.positions[:, 0], used, bool(window.outermost))
            cache = DeltaCache(conv, delta)
        heads = rounded(said, x.dtype).reshape(batch, width, d.heads, d.value_dim)
        normed = self.norm(heads, used).reshape(batch, width, -1).astype(jnp.float32)
        gate = jax.nn.silu(self.in_proj_z(x, used).astype(jnp.float32))
        return self.out_proj(rounded(normed * gate, x.dtype), used), cache

    def _added(self, x, mixed, used):
        """Return what positions add to the state, and ask of it, of the layer's input [B, W, K] and its convolution [B, W, C]."""
        (batch, width, _), d = x.shape, self.d
        keys = d.key_heads * d.key_dim
        q, k = jnp.split(_of_length_one(mixed[..., : 2 * keys].reshape(batch, width, 2 * d.key_heads, d.key_dim)), 2, axis=2)
        q, k = rounded(q * d.key_dim**-0.5, x.dtype), rounded(k, x.dtype)
        gates = self._decay(x, used), jax.nn.sigmoid(self.in_proj_b(x, used))
        decay, rate = (gate.reshape(batch, width, d.key_heads, -1) for gate in gates)
        v = mixed[..., 2 * keys :].reshape(batch, width, d.key_heads, -1)
        return Added(k, v, decay, rate), delta_rule.asked(q, k)

    def _decay(self, x, used):
        rate, bias = (leaf.get_value().astype(jnp.float32)[None, None] for leaf in (self.A_log, self.dt_bias))
        return jnp.exp(-jnp.exp(rate) * jax.nn.softplus(self.in_proj_a(x, used) + bias))


def _of_length_one(x):
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(ordered_sum(y * y)[..., None] + EPSILON)
