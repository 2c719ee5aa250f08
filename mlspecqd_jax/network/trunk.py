"""A decoder's layers, one after another, from tokens to what the head reads.

Notation: B batch, W window (the positions of one pass), K hidden size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mlspecqd_jax.network import config
from mlspecqd_jax.network.delta_net import DeltaNet
from mlspecqd_jax.network.experts import Experts
from mlspecqd_jax.network.layers import MLP, Attention, Embedding, GatedMLP, Window, norm_of
from mlspecqd_jax.network.ops import rotary, scaled
from mlspecqd_jax.network.short_conv import ShortConv

# What they are called in a file.
MIXERS: dict[type, str] = {config.Attention: "self_attn", config.ShortConv: "conv", config.DeltaNet: "linear_attn"}


class Block(nnx.Module):
    """A decoder layer: attention, or what stands for it, and MLP between norms, named as in the file (`config.Layer`)."""

    def __init__(self, layer: config.Layer, norm: config.Norm, k: int, *, init, rngs: nnx.Rngs):
        self.layer = layer
        for name in filter(None, layer.norms):
            setattr(self, name, norm_of(k, norm))
        setattr(self, MIXERS[type(layer.mixer)], _mixer(layer.mixer, k, init=init, rngs=rngs))
        if isinstance(layer.feed, config.GatedMLP):
            self.mlp = GatedMLP(layer.feed, k, init=init, rngs=rngs)
        elif isinstance(layer.feed, config.Experts):
            self.mlp = Experts(layer.feed, k, init=init, rngs=rngs)
        else:
            self.mlp = MLP(layer.feed, k, init=init, rngs=rngs)

    def __call__(self, x, window: Window, cache):
        """Return (x [B, W, K], updated cache), as `Attention` takes its arguments."""
        before, after, before_feed, after_feed = (getattr(self, name) if name else _identity for name in self.layer.norms)
        used, scale = window.used, self.layer.scale
        h = before(x, used)
        mixed, cache = getattr(self, MIXERS[type(self.layer.mixer)])(h, window, cache)
        y = x + scaled(after(mixed, used), scale)
        if not self.layer.parallel:
            return y + scaled(after_feed(self.mlp(before_feed(y, used), used), used), scale), cache
        fed = self.mlp(h if self.layer.norms[2] is None else before_feed(x, used), used)
        return y + scaled(after_feed(fed, used), scale), cache


def _mixer(mixer, k, **how):
    match mixer:
        case config.Attention():
            return Attention(mixer, k, **how)
        case config.ShortConv():
            return ShortConv(mixer, k, **how)
        case config.DeltaNet():
            return DeltaNet(mixer, k, **how)


def _identity(x, used):
    return x


class Trunk(nnx.Module):
    """Embedding, layers and final norm: tokens [B, W], of which `used` are such (see `ops`), to hidden states [B, W, K]."""

    def __init__(self, c: config.Config, *, init, rngs: nnx.Rngs):
        self.ropes = tuple(getattr(layer.mixer, "rope", None) for layer in c.layers)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.embed_scale, init=init, rngs=rngs)
        positions = c.max_positions if c.learned_positions else 0
        self.embed_positions = Embedding(positions, c.hidden_size, 1.0, init=init, rngs=rngs) if positions else None
        self.layers = nnx.List([Block(layer, c.norm, c.hidden_size, init=init, rngs=rngs) for layer in c.layers])
        self.norm = norm_of(c.hidden_size, c.norm)

    def embed(self, tokens, positions):
        """Return what the first layer reads of tokens at positions, both [B, W]."""
        x = self.embed_tokens(tokens)
        if self.embed_positions is None:
            return x
        last = self.embed_positions.weight.get_value().shape[0] - 1  # beyond which there is only padding
        return x + self.embed_positions(jnp.minimum(positions, last))

    def __call__(self, tokens, start, caches, used=None, outermost=False):
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]  # [B, W]
        ropes = dict.fromkeys(self.ropes)
        windows = {rope: Window(positions, None if rope is None else rotary(positions, rope), used, outermost) for rope in ropes}
        x = self.embed(tokens, positions)
        updated = []
        for i, (layer, rope) in enumerate(zip(self.layers, self.ropes, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, windows[rope], None if caches is None else caches[i])
            updated.append(cache)
        return self.norm(x, used), None if caches is None else updated
