"""A decoder's layers, one after another, from tokens to what the head reads.

Notation: B batch, W window (the positions of one pass), K hidden size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.attention import ExpertsRead
from mlspecqd_jax.network.delta_net import DeltaNet
from mlspecqd_jax.network.experts import Experts
from mlspecqd_jax.network.latent_attention import LatentAttention
from mlspecqd_jax.network.layers import MLP, Attention, Embedding, GatedMLP, Window, norm_of
from mlspecqd_jax.network.ops import product, rotary, scaled
from mlspecqd_jax.network.own_inputs import OwnInput, OwnInputs
from mlspecqd_jax.network.short_conv import ShortConv

# What they are, and are called in a file.
MIXERS: dict[type, tuple[Any, str]] = {
    config.Attention: (Attention, "self_attn"),
    config.LatentAttention: (LatentAttention, "self_attn"),
    config.ShortConv: (ShortConv, "conv"),
    config.DeltaNet: (DeltaNet, "linear_attn"),
}


class Block(nnx.Module):
    """A decoder layer: attention, or what stands for it, and MLP between norms, named as in the file (`config.Layer`)."""

    def __init__(self, layer: config.Layer, norm: config.Norm, k: int, *, init, rngs: nnx.Rngs):
        self.layer = layer
        for name in filter(None, layer.norms):
            setattr(self, name, norm_of(k, norm))
        kind, name = MIXERS[type(layer.mixer)]
        setattr(self, name, kind(layer.mixer, k, init=init, rngs=rngs))
        if isinstance(layer.feed, config.GatedMLP):
            self.mlp = GatedMLP(layer.feed, k, init=init, rngs=rngs)
        elif isinstance(layer.feed, config.Experts):
            self.mlp = Experts(layer.feed, k, init=init, rngs=rngs)
        else:
            self.mlp = MLP(layer.feed, k, init=init, rngs=rngs)
        self.own = None if layer.own is None else OwnInput(layer.own, norm, k, init=init, rngs=rngs)
        self.layer_scalar = nnx.Param(jnp.ones((1,))) if layer.scalar else None

    def __call__(self, x, window: Window, cache):
        """Return (x [B, W, K], its cache, how many experts were read or None), as `Attention` takes its arguments."""
        x, cache, read = self._parts(x, window, cache)
        if self.own is not None and window.own is not None:
            x = x + self.own(x, window.own, window.used)
        if self.layer_scalar is not None:
            x = product(x, self.layer_scalar.get_value().reshape(1, 1, 1))
        return x, cache, read

    def _parts(self, x, window, cache):
        before, after, before_feed, after_feed = (getattr(self, name) if name else _identity for name in self.layer.norms)
        used, scale = window.used, self.layer.scale
        h = before(x, used)
        _, name = MIXERS[type(self.layer.mixer)]
        mixed, cache = getattr(self, name)(h, window, cache)
        y = x + scaled(after(mixed, used), scale)
        if not self.layer.parallel:
            fed, read = self._fed(before_feed(y, used), used)
        else:
            fed, read = self._fed(h if self.layer.norms[2] is None else before_feed(x, used), used)
        return y + scaled(after_feed(fed, used), scale), cache, read

    def _fed(self, x, used):
        return self.mlp(x, used) if isinstance(self.mlp, Experts) else (self.mlp(x, used), None)


def _identity(x, used):
    return x


@functools.partial(jax.jit, static_argnames=("graphdef", "outermost"))
def _run(graphdef, state, x, window: Window, cache, outermost):
    """Apply a block; those of equal parts are traced and lowered once."""
    return nnx.merge(graphdef, state)(x, window._replace(outermost=outermost), cache)


class Trunk(nnx.Module):
    """Embedding, layers and final norm: tokens [B, W], of which `used` are such (see `ops`), to hidden states [B, W, K]."""

    def __init__(self, c: config.Config, *, init, rngs: nnx.Rngs):
        self.ropes = tuple(layer.mixer.rope for layer in c.layers)
        self.kept_by = tuple(layer.mixer.kept_by for layer in c.layers)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.embed_scale, init=init, rngs=rngs)
        positions = c.max_positions if c.learned_positions else 0
        self.embed_positions = Embedding(positions, c.hidden_size, 1.0, init=init, rngs=rngs) if positions else None
        self.layers = nnx.List([Block(layer, c.norm, c.hidden_size, init=init, rngs=rngs) for layer in c.layers])
        self.norm = norm_of(c.hidden_size, c.norm)
        own = c.layers[0].own
        self.own_inputs = None if own is None else OwnInputs(own, c.norm, c.hidden_size, init=init, rngs=rngs)

    def embed(self, tokens, positions):
        """Return what the first layer reads of tokens at positions, both [B, W]."""
        x = self.embed_tokens(tokens)
        if self.embed_positions is None:
            return x
        last = self.embed_positions.weight.get_value().shape[0] - 1  # beyond which there is only padding
        return x + self.embed_positions(jnp.minimum(positions, last))

    def own_inputs_of(self, tokens, x, used=None):
        """Return what each layer alone is told of tokens [B, W] with embeddings x [B, W, K], or None."""
        return None if self.own_inputs is None else self.own_inputs(tokens, x, used)

    def __call__(self, tokens, start, caches, used=None, outermost=False):
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]  # [B, W]
        slots = None if caches is not None else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        turned = {rope: None if rope is None else rotary(positions, rope) for rope in dict.fromkeys(self.ropes)}
        x = self.embed(tokens, positions)
        own = self.own_inputs_of(tokens, x, used) or [None] * len(self.layers)
        kept, reads = [], []  # caches by layer, also those that a layer has of an earlier one
        for i, (layer, source) in enumerate(zip(self.layers, self.kept_by, strict=True)):
            window = Window(positions, turned[self.ropes[i]], used, slots, own[i])
            given = kept[source] if source is not None else None if caches is None else caches[i]
            with jax.named_scope(f"layer_{i}"):
                x, cache, read = _run(*nnx.split(layer), x, window, given, outermost)
            kept.append(cache)
            reads += [] if read is None else [read]
        updated = [None if source is not None else cache for cache, source in zip(kept, self.kept_by, strict=True)]
        if caches is not None and reads:
            mean = functools.reduce(jnp.add, reads).astype(jnp.float32) / len(reads)
            updated.append(ExpertsRead(caches[-1].total + mean))
        return self.norm(x, used), None if caches is None else updated
