"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in its absorbed form.

A position's keys and values are products with one latent, and what is kept of it is that latent and the key that a rope turns,
which all heads have in common. A head's product of a query and a key, q (A c), is (q A) c, and its values are taken out of the
latents' mean: so all heads attend to one entry for each position, which is key and value at once, and no head's key or value is
ever made.

That reads no more than the cache and each weight once. Over a whole prompt it is more arithmetic than keys and values would be.

Notation: B batch, W window, K hidden size, H heads, R size of a latent, D of a head's key, T of what is turned, V of a head's
values.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.attention import KVCache, finite
from mlspecqd_jax.network.layers import ALONG_K, ALONG_N, Linear, Window, grown, norm_of, turned
from mlspecqd_jax.network.ops import attend, head_linear, write

WHOLE = (None, None)  # latents are of all heads, which devices share


class HeadLinear(nnx.Module):
    """`ops.head_linear` with weight [H * N, K], which no twin casts: what it would save is a few hundredths of a pass."""

    def __init__(self, heads: int, n: int, k: int, *, init, rngs: nnx.Rngs):
        self.weight = nnx.Param(init(rngs.params(), (heads * n, k)), axes=ALONG_N)

    def __call__(self, x: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return head_linear(x, self.weight.get_value(), used=used)


class LatentAttention(nnx.Module):
    """Causal attention to latents; softmax in f32."""

    def __init__(self, a: config.LatentAttention, k: int, *, init, rngs: nnx.Rngs):
        self.a = a
        make, by_head = (functools.partial(kind, init=init, rngs=rngs) for kind in (Linear, HeadLinear))
        size = a.heads * (a.key_dim + a.turned_dim)
        if a.query_latent is None:
            self.q_proj = make(size, k, axes=ALONG_N)
        else:
            self.q_a_proj = make(a.query_latent, k, bias=a.bias, axes=WHOLE)
            self.q_a_layernorm = norm_of(a.query_latent, a.norm)
            self.q_b_proj = make(size, a.query_latent, axes=ALONG_N)
        self.kv_a_proj = make(a.latent + a.turned_dim, k, bias=a.bias, axes=WHOLE)
        self.kv_a_layernorm = norm_of(a.latent, a.norm)
        self.k_b_proj = by_head(a.heads, a.latent, a.key_dim)
        self.v_b_proj = by_head(a.heads, a.value_dim, a.latent)
        self.o_proj = make(k, a.heads * a.value_dim, bias=a.output_bias, axes=ALONG_K)

    def __call__(self, x: jax.Array, window: Window, cache: KVCache | None) -> tuple[jax.Array, KVCache]:
        """Return (output [B, W, K], latents) of x [B, W, K], as `layers.Attention` does."""
        a, used, last = self.a, window.used, window.positions if window.slots is None else window.slots
        q = self._queries(x, window)
        entry = self._entry(x, window)
        kept = KVCache(entry, None) if cache is None else write(cache, entry, None, window.positions[:, 0], used)
        out = attend(q, kept.k, kept.v, jnp.zeros_like(last), last, scale=a.scale, used=used)
        latents = out.reshape(*x.shape[:2], a.heads, -1)[..., : a.latent]  # [B, W, H, R]; a mean of keys is of no use
        return self.o_proj(self.v_b_proj(latents, used).reshape(*x.shape[:2], -1), used), kept

    def _queries(self, x, window):
        """Return what is multiplied with entries, [B, H, W, R + T]."""
        a, used = self.a, window.used
        q = self.q_proj(x, used) if a.query_latent is None else self.q_b_proj(self._query_latent(x, used), used)
        q = q.reshape(*x.shape[:2], a.heads, -1)
        of_latents = jnp.swapaxes(self.k_b_proj(q[..., : a.key_dim], used), 1, 2)
        q = jnp.concatenate([of_latents, turned(q[..., a.key_dim :], a.rope, window)], axis=-1)
        return q if a.growth is None else grown(q, window.positions, a.growth)

    def _query_latent(self, x, used):
        return self.q_a_layernorm(self.q_a_proj(x, used), used)

    def _entry(self, x, window):
        """Return what is kept of positions, [B, 1, W, R + T]."""
        both = self.kv_a_proj(x, window.used)
        latent = self.kv_a_layernorm(both[..., : self.a.latent], window.used)[:, None]
        key = turned(both[..., None, self.a.latent :], self.a.rope, window)
        return finite(jnp.concatenate([latent, key], axis=-1))
