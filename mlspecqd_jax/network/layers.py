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


@functools.cache
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
    slots: jax.Array | None = None  # int32 [B, W], where in the keys and values they are; None is at their own numbers
    own: jax.Array | None = None  # what the layer alone is told of their tokens (`own_inputs`)
    outermost: bool | None = None  # static, whether no later one begins before it


class Linear(nnx.Module):
    """x @ weight.T + bias with weight [N, K]."""

    def __init__(self, n: int, k: int, *, axes: tuple, bias: bool = False, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (n, k)), axes=axes, linear=True)
        self.bias = nnx.Param(jnp.zeros((n,)), axes=axes[:1] if axes[0] else ()) if bias else None

    def __call__(self, x: jax.Array, used: jax.Array | None = None, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = linear(x, self.weight.get_value(), used=used, out_dtype=out_dtype)
        return y if self.bias is None else y + jnp.expand_dims(self.bias.get_value().astype(y.dtype), range(y.ndim - 1))


class Embedding(nnx.Module):
    """weight[tokens] * scale with weight [V, K], of which no more than these rows is read; the scale is rounded to its dtype."""

    def __init__(self, vocab: int, k: int, scale: float, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (vocab, k)), axes=ALONG_N, gathered=True)
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
    """Grouped-query causal attention with rotary positions; softmax in f32. Keys and values may be an earlier layer's."""

    def __init__(self, a: config.Attention, k: int, *, init, rngs: nnx.Rngs):
        self.a = a
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.q_proj = make(a.heads * a.head_dim, k, bias=a.bias, axes=ALONG_N)
        keeps, projects = a.kept_by is None, a.kept_by is None and not a.values_of_keys
        self.k_proj = make(a.kv_heads * a.head_dim, k, bias=a.bias, axes=ALONG_N) if keeps else None
        self.v_proj = make(a.kv_heads * a.value_dim, k, bias=a.bias, axes=ALONG_N) if projects else None
        self.o_proj = make(k, a.heads * a.value_dim, bias=a.output_bias, axes=ALONG_K)
        self.q_norm, self.k_norm = _norm_of_heads(a, a.heads), _norm_of_heads(a, a.kv_heads) if keeps else None
        self.v_norm = norm_of(a.value_dim, a.value_norm) if keeps and a.value_norm is not None else None
        self.sinks = nnx.Param(jnp.zeros((a.heads,)), axes=(AXIS,)) if a.sinks else None
        gates = a.heads * {None: 0, "head": 1, "element": a.value_dim}[a.gate]
        self.g_proj = make(gates, k, bias=a.bias and a.gate == "element", axes=ALONG_N) if gates else None

    def __call__(self, x: jax.Array, window: Window, cache: KVCache | None) -> tuple[jax.Array, KVCache]:
        """Return (output [B, W, K], keys and values) of x [B, W, K].

        With a cache these are that cache updated, or, where an earlier layer keeps them, the cache as that layer left it; without
        one they are the window's own, which then attends to itself alone.
        """
        used, last = window.used, window.positions if window.slots is None else window.slots
        q = self._heads(self.q_proj(x, used), self.q_norm, self.a.heads, window)
        if self.a.growth is not None:
            q = grown(q, window.positions, self.a.growth)
        kept = cache if self.k_proj is None else self._kept(self.k_proj(x, used), x, window, cache)
        assert kept is not None, "the layer that keeps them is before this one"
        first = jnp.zeros_like(last) if self.a.window is None else last - self.a.window + 1
        first = first if self.a.chunk is None else jnp.maximum(first, last - window.positions % self.a.chunk)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out = attend(q, kept.k, kept.v, first, last, sinks, scale=self.a.scale, cap=self.a.cap, used=used)  # [B, W, H * Dv]
        out = out if self.g_proj is None else self._gated(out, self.g_proj(x, used))
        return self.o_proj(out, used), kept

    def _gated(self, out, gates):
        gates = jnp.repeat(jax.nn.sigmoid(gates.astype(jnp.float32)), out.shape[-1] // gates.shape[-1], axis=-1)
        return rounded(out.astype(jnp.float32) * gates, out.dtype)

    def _kept(self, raw, x, window, cache):
        """Return the keys and values of x, of which keys are projected, in the cache where there is one."""
        used = window.used
        v = raw if self.v_proj is None else self.v_proj(x, used)
        v = self._clipped(v).reshape(*x.shape[:2], self.a.kv_heads, self.a.value_dim)
        v = jnp.swapaxes(v if self.v_norm is None else self.v_norm(v, used), 1, 2)  # [B, Hkv, W, Dv]
        k, v = finite(self._heads(raw, self.k_norm, self.a.kv_heads, window)), finite(v)
        return KVCache(k, v) if cache is None else write(cache, k, v, window.positions[:, 0], used)

    def _heads(self, x, norm, heads, window):
        """Return queries or keys [B, heads, W, D] of projections [B, W, heads * D]: normed, clipped and rotated."""
        of, used = self.a.qk_norm_of, window.used
        x = self._clipped(norm(x, used) if norm is not None and of == "all" else x)
        x = x.reshape(*x.shape[:2], heads, self.a.head_dim)
        x = x if norm is None or of == "all" or self.a.qk_norm_last else norm(x, used)
        x = turned(x, self.a.rope, window)
        return norm(x) if norm is not None and of != "all" and self.a.qk_norm_last else x

    def _clipped(self, x):
        return x if self.a.clip is None else jnp.clip(x, -self.a.clip, self.a.clip)


def turned(x: jax.Array, rope: config.Rope | None, window: Window) -> jax.Array:
    """Return heads [B, W, heads, D] as [B, heads, W, D], rotated where there is a rope."""
    if rope is None or window.rotation is None:
        return jnp.swapaxes(x, 1, 2)
    if rope.interleaved:
        # Queries and keys are put in another order alike, which changes none of their products.
        size = 2 * len(rope.frequencies)
        x = jnp.concatenate([x[..., 0:size:2], x[..., 1:size:2], x[..., size:]], axis=-1)
    return rotate(x, *window.rotation, window.used)


def grown(q: jax.Array, positions: jax.Array, growth: config.Growth) -> jax.Array:
    """Return queries [B, heads, W, D] at positions [B, W] times what is said of these."""
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
