"""What a layer is told of a token beside the residual stream: a row of a second embedding, a part of it for each layer (Gemma 4).

That embedding has as many numbers as all layers together, and is read a row at a time: no pass reads it whole.

Notation: B batch, W window, K hidden size, L layers, D size of a layer's part.
"""

import functools

import jax
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.layers import ALONG_K, ALONG_N, Embedding, Linear, gated, norm_of
from mlspecqd_jax.network.ops import scaled


class OwnInputs(nnx.Module):
    """(norm(x @ projection.T / sqrt(K)) + embedding[tokens] * sqrt(D)) / sqrt(2), of the embeddings x of tokens, for each layer."""

    def __init__(self, own: config.OwnInput, norm: config.Norm, k: int, *, init, rngs: nnx.Rngs):
        self.own = own
        self.embed_tokens = Embedding(own.vocab_size, own.layers * own.size, own.size**0.5, init=init, rngs=rngs)
        self.projection = Linear(own.layers * own.size, k, axes=ALONG_N, init=init, rngs=rngs)
        self.norm = norm_of(own.size, norm)

    def __call__(self, tokens: jax.Array, x: jax.Array, used: jax.Array | None = None) -> list[jax.Array]:
        """Return the parts [B, W, D] of all layers, of tokens [B, W] and their embeddings x [B, W, K]."""
        shape = (*tokens.shape, self.own.layers, self.own.size)
        projected = scaled(self.projection(x, used), x.shape[-1] ** -0.5).reshape(shape)
        both = scaled(self.norm(projected, used) + self.embed_tokens(tokens).reshape(shape), 2**-0.5)
        return [both[:, :, i] for i in range(self.own.layers)]


class OwnInput(nnx.Module):
    """norm(down(act(gate(x)) * own)), to be added to x [B, W, K], with own [B, W, D]."""

    def __init__(self, own: config.OwnInput, norm: config.Norm, k: int, *, init, rngs: nnx.Rngs):
        make = functools.partial(Linear, init=init, rngs=rngs)
        self.gate_proj = make(own.size, k, axes=ALONG_N)
        self.down_proj = make(k, own.size, axes=ALONG_K)
        self.norm = norm_of(k, norm)
        self.gated = gated(own.act)

    def __call__(self, x: jax.Array, own: jax.Array, used: jax.Array | None = None) -> jax.Array:
        return self.norm(self.down_proj(self.gated(self.gate_proj(x, used), own), used), used)
