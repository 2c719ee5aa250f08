"""The layers of a decoder-only transformer, in flax nnx, as `config` describes them.

Attributes are named as in Hugging Face's tensor names (`self_attn.q_proj.weight`). How a weight is stored is the leaf's business:
the same module applied to other leaves is another model. A parameter says of itself whether it may be quantized (`linear`) and over
which mesh axis each of its dimensions may be split (`axes`): along N where its output feeds heads or the MLP's middle, along K
where its input comes from there (one all-reduce follows).

Notation: B batch, W window (the positions of one pass), S cache length, H query heads, D head size, V vocabulary, N outputs, K
inputs or hidden size. The causal mask is computed from absolute positions, so entries of the cache beyond a row's length are never
read and need no trimming.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.attention import KVCache, finite
from mlspecqd_jax.network.ops import attend, linear, rms_norm, rotary, rotate, rows, write
from mlspecqd_jax.weights.tensors import AXIS

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


ALONG_N, ALONG_K = (AXIS, None), (None, AXIS)


class Window(NamedTuple):
    """What a layer's pass is over."""

    positions: jax.Array  # int32 [B, W], absolute
    rotation: tuple[jax.Array, jax.Array]  # cos and sin of the rope's angles at them, f32 [B, W, D / 2]
    used: jax.Array | None = None  # int32 [B], how many of them, from the first on, hold a token (see `ops`); None is all


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
        found = rows(self.weight.get_value(), tokens)
        return found if self.scale == 1 else found * jnp.asarray(self.scale, found.dtype)


class RMSNorm(nnx.Module):
    """`ops.rms_norm` with its weight [K]."""

    def __init__(self, k: int, norm: config.Norm):
        self.weight = nnx.Param(jnp.full((k,), 1 - norm.offset))
        self.norm = norm

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), self.norm, used)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; softmax in f32."""

    def __init__(self, a: config.Attention, k: int, *, init, rngs: nnx.Rngs):
        self.a = a
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.q_proj = make(a.heads * a.head_dim, k, bias=a.bias, axes=ALONG_N)
        self.k_proj = make(a.kv_heads * a.head_dim, k, bias=a.bias, axes=ALONG_N)
        self.v_proj = make(a.kv_heads * a.value_dim, k, bias=a.bias, axes=ALONG_N)
        self.o_proj = make(k, a.heads * a.value_dim, bias=a.output_bias, axes=ALONG_K)
        self.q_norm = RMSNorm(a.head_dim, a.qk_norm) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.qk_norm) if a.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros((a.heads,)), axes=(AXIS,)) if a.sinks else None

    def __call__(self, x: jax.Array, window: Window, cache: KVCache | None):
        """Return (output [B, W, K], updated cache) of x [B, W, K]; without a cache the window attends to itself alone."""
        (batch, width, _), used = x.shape, window.used
        q = self.q_proj(x, used).reshape(batch, width, self.a.heads, self.a.head_dim)
        k = self.k_proj(x, used).reshape(batch, width, self.a.kv_heads, self.a.head_dim)
        v = self.v_proj(x, used).reshape(batch, width, self.a.kv_heads, self.a.value_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, used), self.k_norm(k, used)
        q, k = rotate(q, *window.rotation, used), rotate(k, *window.rotation, used)  # [B, heads, W, D]
        k, v = finite(k), finite(jnp.swapaxes(v, 1, 2))
        last = window.positions
        if cache is None:
            last = jnp.broadcast_to(jnp.arange(width), last.shape)
        else:
            cache = write(cache, k, v, last[:, 0], used)
            k, v = cache
        first = jnp.zeros_like(last) if self.a.window is None else last - self.a.window + 1
        sinks = None if self.sinks is None else self.sinks.get_value()
        out = attend(q, k, v, first, last, sinks, scale=self.a.scale, cap=self.a.cap, used=used)  # [B, W, H * Dv]
        return self.o_proj(out, used), cache


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, mlp: config.GatedMLP, k: int, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=mlp.bias, init=init, rngs=rngs)
        self.gate_proj = make(mlp.size, k, axes=ALONG_N)
        self.up_proj = make(mlp.size, k, axes=ALONG_N)
        self.down_proj = make(k, mlp.size, axes=ALONG_K)
        self.activation = ACTIVATIONS[mlp.act]

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x, used)) * self.up_proj(x, used), used)


class Block(nnx.Module):
    """A decoder layer: attention and MLP between norms, which are named as in the file (`config.Layer`)."""

    def __init__(self, layer: config.Layer, norm: config.Norm, k: int, *, init, rngs: nnx.Rngs):
        self.names = layer.norms
        for name in filter(None, layer.norms):
            setattr(self, name, RMSNorm(k, norm))
        self.self_attn = Attention(layer.mixer, k, init=init, rngs=rngs)
        self.mlp = GatedMLP(layer.feed, k, init=init, rngs=rngs)

    def __call__(self, x, window: Window, cache):
        """Return (x [B, W, K], updated cache), as `Attention` takes its arguments."""
        before, after, before_feed, after_feed = (getattr(self, name) if name else _identity for name in self.names)
        mixed, cache = self.self_attn(before(x, window.used), window, cache)
        x = x + after(mixed, window.used)
        return x + after_feed(self.mlp(before_feed(x, window.used), window.used), window.used), cache


def _identity(x, used):
    return x


class Trunk(nnx.Module):
    """Embedding, layers and final norm: tokens [B, W], of which `used` are such (see `ops`), to hidden states [B, W, K]."""

    def __init__(self, c: config.Config, *, init, rngs: nnx.Rngs):
        self.ropes = tuple(layer.mixer.rope for layer in c.layers)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.embed_scale, init=init, rngs=rngs)
        self.layers = nnx.List([Block(layer, c.norm, c.hidden_size, init=init, rngs=rngs) for layer in c.layers])
        self.norm = RMSNorm(c.hidden_size, c.norm)

    def __call__(self, tokens, start, caches, used=None):
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]  # [B, W]
        windows = {rope: Window(positions, rotary(positions, rope), used) for rope in dict.fromkeys(self.ropes)}
        x = self.embed_tokens(tokens)
        updated = []
        for i, (layer, rope) in enumerate(zip(self.layers, self.ropes, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, windows[rope], None if caches is None else caches[i])
            updated.append(cache)
        return self.norm(x, used), None if caches is None else updated
