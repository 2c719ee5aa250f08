"""The parts of a decoder's layers, in flax nnx, as `config` describes them.

Attributes are named as in Hugging Face's tensor names (`self_attn.q_proj.weight`). How a weight is stored is the leaf's business:
the same module applied to other leaves is another model. A parameter says of itself whether it may be quantized (`linear`) and over
which mesh axis each of its dimensions may be split (`axes`): along N where its output feeds heads or the MLP's middle, along K
where its input comes from there (one all-reduce follows).

Notation: B batch, W window (the positions of one pass), S cache length, H query heads, D head size, V vocabulary, N outputs, K
inputs or hidden size. The causal mask is computed from absolute positions, so entries of the cache beyond a row's length are never
read and need no trimming.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.attention import KVCache, finite
from mlspecqd_jax.network.ops import attend, layer_norm, linear, product, rms_norm, rotate, rounded, rows, scaled, write
from mlspecqd_jax.weights.tensors import AXIS

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def gated(act: str | config.ClampedSwish) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the function of a gate and of what it gates: act(gate) * up, or `config.ClampedSwish`."""
    if isinstance(act, config.ClampedSwish):
        return functools.partial(_clamped_swish, act)
    activation = ACTIVATIONS[act]
    return lambda gate, up: activation(gate) * up


def _clamped_swish(act, gate, up):
    gate, up = jnp.minimum(gate, act.limit), jnp.clip(up, -act.limit, act.limit)
    return gate * jax.nn.sigmoid(act.alpha * gate) * (up + 1)


class XIELU(nnx.Module):
    """a x^2 + beta x for x > 0, else b (exp(min(x, eps)) - 1 - x) + beta x, in f32 (Huang and Schlag, arXiv 2411.13010)."""

    def __init__(self):
        self.alpha_p, self.alpha_n = nnx.Param(jnp.zeros((1,))), nnx.Param(jnp.zeros((1,)))
        self.beta, self.eps = nnx.Param(jnp.full((), 0.5)), nnx.Param(jnp.full((), -1e-6))

    def __call__(self, x: jax.Array) -> jax.Array:
        parameters = (self.alpha_p, self.alpha_n, self.beta, self.eps)
        p, n, beta, eps = (leaf.get_value().astype(jnp.float32).reshape((1,) * x.ndim) for leaf in parameters)
        y = x.astype(jnp.float32)
        above = product(jax.nn.softplus(p) * y, y)
        below = product(jnp.expm1(jnp.minimum(y, eps)) - y, beta + jax.nn.softplus(n))
        return (jnp.where(y > 0, above, below) + product(beta, y)).astype(x.dtype)


ALONG_N, ALONG_K = (AXIS, None), (None, AXIS)


class Window(NamedTuple):
    """What a layer's pass is over."""

    positions: jax.Array  # int32 [B, W], absolute
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin of the rope's angles at them, f32 [B, W, D / 2]; None without one
    used: jax.Array | None = None  # int32 [B], how many of them, from the first on, hold a token (see `ops`); None is all
    outermost: bool = False  # static, whether no later one begins before it


class Linear(nnx.Module):
    """x @ weight.T + bias with weight [N, K]."""

    def __init__(self, n: int, k: int, *, axes: tuple, bias: bool = False, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (n, k)), axes=axes, linear=True)
        self.bias = nnx.Param(jnp.zeros((n,)), axes=axes[:1] if axes[0] else ()) if bias else None

    def __call__(self, x: jax.Array, used: jax.Array | None = None, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = linear(x, self.weight.get_value(), used=used, out_dtype=out_dtype)
        return y if self.bias is None else y + jnp.expand_dims(self.bias.get_value().astype(y.dtype), range(y.ndim - 1))


class Embedding(nnx.Module):
    """weight[tokens] * scale with weight [V, K]; the scale is rounded to the weight's dtype."""

    def __init__(self, vocab: int, k: int, scale: float, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (vocab, k)), axes=ALONG_N)
        self.scale = scale

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return scaled(rows(self.weight.get_value(), tokens), self.scale)


class RMSNorm(nnx.Module):
    """`ops.rms_norm` with its weight [K], where it has one."""

    def __init__(self, k: int, norm: config.Norm):
        self.weight = nnx.Param(jnp.full((k,), 1 - norm.offset)) if norm.weight else None
        self.norm = norm

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        weight = jnp.ones(x.shape[-1:], x.dtype) if self.weight is None else self.weight.get_value()
        return rms_norm(x, weight, self.norm, used)


class LayerNorm(nnx.Module):
    """`ops.layer_norm` with its weight and bias [K], where it has them."""

    def __init__(self, k: int, norm: config.Norm):
        self.weight = nnx.Param(jnp.full((k,), 1 - norm.offset)) if norm.weight else None
        self.bias = nnx.Param(jnp.zeros((k,))) if norm.bias else None
        self.norm = norm

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        weight = jnp.ones(x.shape[-1:], x.dtype) if self.weight is None else self.weight.get_value()
        bias = jnp.zeros(x.shape[-1:], x.dtype) if self.bias is None else self.bias.get_value()
        return layer_norm(x, weight, bias, self.norm, used)


class HeadsNorm(nnx.Module):
    """A norm of each head of x [..., H, D] with weights of its own [H, D]."""

    def __init__(self, heads: int, k: int, norm: config.Norm):
        self.weight = nnx.Param(jnp.ones((heads, k)), axes=ALONG_N)
        self.norm = LayerNorm(k, dataclasses.replace(norm, weight=False))

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return self.norm(x, used) * jnp.expand_dims(self.weight.get_value(), range(x.ndim - 2))


def norm_of(k: int, norm: config.Norm) -> RMSNorm | LayerNorm:
    """Return the norm of vectors [K] that a config describes."""
    return LayerNorm(k, norm) if norm.centered else RMSNorm(k, norm)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; softmax in f32."""

    def __init__(self, a: config.Attention, k: int, *, init, rngs: nnx.Rngs):
        self.a = a
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.q_proj = make(a.heads * a.head_dim, k, bias=a.bias, axes=ALONG_N)
        self.k_proj = make(a.kv_heads * a.head_dim, k, bias=a.bias, axes=ALONG_N)
        self.v_proj = make(a.kv_heads * a.value_dim, k, bias=a.bias, axes=ALONG_N)
        self.o_proj = make(k, a.heads * a.value_dim, bias=a.output_bias, axes=ALONG_K)
        self.q_norm, self.k_norm = _norm_of_heads(a, a.heads), _norm_of_heads(a, a.kv_heads)
        self.sinks = nnx.Param(jnp.zeros((a.heads,)), axes=(AXIS,)) if a.sinks else None
        gates = a.heads * {None: 0, "head": 1, "element": a.value_dim}[a.gate]
        self.g_proj = make(gates, k, bias=a.bias and a.gate == "element", axes=ALONG_N) if gates else None

    def __call__(self, x: jax.Array, window: Window, cache: KVCache | None):
        """Return (output [B, W, K], updated cache) of x [B, W, K]; without a cache the window attends to itself alone."""
        (batch, width, _), used = x.shape, window.used
        q, k, v = self.q_proj(x, used), self.k_proj(x, used), self.v_proj(x, used)
        if self.a.qk_norm_of == "all":
            q, k = self._normed(q, k, used)
        if self.a.clip is not None:
            q, k, v = (jnp.clip(part, -self.a.clip, self.a.clip) for part in (q, k, v))
        q = q.reshape(batch, width, self.a.heads, self.a.head_dim)
        k = k.reshape(batch, width, self.a.kv_heads, self.a.head_dim)
        v = v.reshape(batch, width, self.a.kv_heads, self.a.value_dim)
        if self.a.qk_norm_of != "all" and not self.a.qk_norm_last:
            q, k = self._normed(q, k, used)
        q, k, v = self._turned(q, window), self._turned(k, window), jnp.swapaxes(v, 1, 2)  # [B, heads, W, D]
        if self.a.qk_norm_last:
            q, k = self._normed(q, k)
        if self.a.growth is not None:
            q = _grown(q, window.positions, self.a.growth)
        k, v = finite(k), finite(v)
        last = window.positions
        if cache is None:
            last = jnp.broadcast_to(jnp.arange(width), last.shape)
        else:
            cache = write(cache, k, v, last[:, 0], used)
            k, v = cache
        first = jnp.zeros_like(last) if self.a.window is None else last - self.a.window + 1
        first = first if self.a.chunk is None else jnp.maximum(first, last - window.positions % self.a.chunk)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out = attend(q, k, v, first, last, sinks, scale=self.a.scale, cap=self.a.cap, used=used)  # [B, W, H * Dv]
        out = out if self.g_proj is None else self._gated(out, self.g_proj(x, used))
        return self.o_proj(out, used), cache

    def _normed(self, q, k, used=None):
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q, used), self.k_norm(k, used))

    def _gated(self, out, gates):
        gates = jnp.repeat(jax.nn.sigmoid(gates.astype(jnp.float32)), out.shape[-1] // gates.shape[-1], axis=-1)
        return rounded(out.astype(jnp.float32) * gates, out.dtype)

    def _turned(self, x, window):
        """Return heads [B, W, heads, D] as [B, heads, W, D], rotated where there is a rope."""
        if self.a.rope is None or window.rotation is None:
            return jnp.swapaxes(x, 1, 2)
        if self.a.rope.interleaved:
            # Queries and keys are put in another order alike, which changes none of their products.
            turned = 2 * len(self.a.rope.frequencies)
            x = jnp.concatenate([x[..., 0:turned:2], x[..., 1:turned:2], x[..., turned:]], axis=-1)
        return rotate(x, *window.rotation, window.used)


def _grown(q, positions, growth: config.Growth):
    factors = jnp.asarray(growth.factors, jnp.float32)[
        jnp.minimum((positions + growth.ahead) // growth.period, len(growth.factors) - 1)
    ]
    return q * factors[:, None, :, None].astype(q.dtype)


def _norm_of_heads(a: config.Attention, heads: int):
    if a.qk_norm is None:
        return None
    if a.qk_norm_of == "each":
        return HeadsNorm(heads, a.head_dim, a.qk_norm)
    return norm_of(heads * a.head_dim if a.qk_norm_of == "all" else a.head_dim, a.qk_norm)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, mlp: config.GatedMLP, k: int, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=mlp.bias, init=init, rngs=rngs)
        self.gate_proj = make(mlp.size, k, axes=ALONG_N)
        self.up_proj = make(mlp.size, k, axes=ALONG_N)
        self.down_proj = make(k, mlp.size, axes=ALONG_K)
        self.gated = gated(mlp.act)

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return self.down_proj(self.gated(self.gate_proj(x, used), self.up_proj(x, used)), used)


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, mlp: config.MLP, k: int, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=mlp.bias, init=init, rngs=rngs)
        self.up_proj = make(mlp.size, k, axes=ALONG_N)
        self.down_proj = make(k, mlp.size, axes=ALONG_K)
        self.act_fn = XIELU() if mlp.act == "xielu" else ACTIVATIONS[mlp.act]

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return self.down_proj(self.act_fn(self.up_proj(x, used)), used)
