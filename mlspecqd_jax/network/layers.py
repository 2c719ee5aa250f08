"""The layers of a decoder-only transformer (Llama, Mistral, Qwen2, Qwen3), in flax nnx.

Attributes are named as in Hugging Face's tensor names (`self_attn.q_proj.weight`). How a weight is stored is the leaf's business:
the same module applied to other leaves is another model.

Notation: B batch, W window (the positions of one pass), S cache length, H query heads, D head size, V vocabulary, N outputs, K
inputs or hidden size. The causal mask is computed from absolute positions, so entries of the cache beyond a row's length are never
read and need no trimming.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network.attention import KVCache, attend, finite, write
from mlspecqd_jax.network.config import ModelConfig
from mlspecqd_jax.network.matmul import linear
from mlspecqd_jax.network.moves import rows
from mlspecqd_jax.network.norms import rms_norm
from mlspecqd_jax.network.rope import inverse_frequencies, rotary, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Module):
    """x @ weight.T + bias with weight [N, K]."""

    def __init__(self, n: int, k: int, *, bias: bool, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (n, k)))
        self.bias = nnx.Param(jnp.zeros((n,))) if bias else None

    def __call__(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = linear(x, self.weight.get_value(), out_dtype=out_dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embedding(nnx.Module):
    """weight[tokens] with weight [V, K]."""

    def __init__(self, vocab: int, k: int, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (vocab, k)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return rows(self.weight.get_value(), tokens)


class RMSNorm(nnx.Module):
    """`norms.rms_norm` with its weight [K]."""

    def __init__(self, k: int, eps: float):
        self.weight = nnx.Param(jnp.ones((k,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), self.eps)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions; softmax in f32."""

    def __init__(self, config: ModelConfig, layer: int, *, init, rngs: nnx.Rngs):
        c, heads, kv = config, config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv, c.head_dim
        self.sliding_window = c.sliding_windows[layer] if c.sliding_windows else None
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.q_proj = make(heads * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.k_proj = make(kv * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.v_proj = make(kv * c.head_dim, c.hidden_size, bias=c.qkv_bias)
        self.o_proj = make(c.hidden_size, heads * c.head_dim, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def __call__(self, x, positions, rotation, cache: KVCache | None):
        """Return (output [B, W, K], updated cache); without a cache the window attends to itself alone."""
        batch, window, _ = x.shape
        q = self.q_proj(x).reshape(batch, window, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, window, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, window, self.kv_heads, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rotation), rotate(k, *rotation), jnp.swapaxes(v, 1, 2)  # [B, heads, W, D]
        k, v = finite(k), finite(v)
        last = positions
        if cache is None:
            last = jnp.broadcast_to(jnp.arange(window), positions.shape)
        else:
            cache = write(cache, k, v, positions[:, 0])
            k, v = cache
        first = jnp.zeros_like(last) if self.sliding_window is None else last - self.sliding_window + 1
        out = attend(q, k, v, first, last)  # [B, W, H * D]
        return self.o_proj(out), cache


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, bias=config.mlp_bias, init=init, rngs=rngs)
        self.gate_proj = make(config.intermediate_size, config.hidden_size)
        self.up_proj = make(config.intermediate_size, config.hidden_size)
        self.down_proj = make(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, *, init, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, init=init, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, init=init, rngs=rngs)

    def __call__(self, x, positions, rotation, cache):
        attended, cache = self.self_attn(self.input_layernorm(x), positions, rotation, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Trunk(nnx.Module):
    """Embedding, layers and final norm: tokens [B, W] to hidden states [B, W, K]."""

    def __init__(self, config: ModelConfig, *, init, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, init=init, rngs=rngs)
        self.layers = nnx.List([Block(config, i, init=init, rngs=rngs) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, tokens, start, caches):
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]  # [B, W]
        c = self.config
        rotation = rotary(positions, inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        x = self.embed_tokens(tokens)
        updated = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, positions, rotation, None if caches is None else caches[i])
            updated.append(cache)
        return self.norm(x), None if caches is None else updated
