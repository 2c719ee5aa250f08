"""`second_moments`: what each linear layer of a model is given to multiply, as the sum of x x^T, layer by layer.

Notation: B texts, S positions each, K contracted.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from mlspecqd_jax.network.attention import KVCache
from mlspecqd_jax.network.layers import Window
from mlspecqd_jax.network.network import FIRST, Network
from mlspecqd_jax.network.ops import rotary
from mlspecqd_jax.weights.quantized_array import watch
from mlspecqd_jax.weights.tensors import HEAD


def second_moments(
    network: Network, params: Mapping[str, jax.Array], tokens: jax.Array, counted: jax.Array
) -> Iterator[dict[str, jax.Array]]:
    """Yield, of what is before the layers, layer after layer and at last of the head, the sum of x x^T, f32 [K, K], by weight.

    Only what a layer makes of the texts is kept for the next, and keys and values that later ones read, so memory holds one layer's
    sums at a time. Layers of one kind are one compiled program.

    Args:
      network: of the model.
      params: its parameters, not quantized.
      tokens: int32 [B, S].
      counted: how often each position counts, f32 [B, S].
    """
    around = {name: w for name, w in params.items() if ".layers." not in name}
    first = _alone(network, 0)
    x, own, found = _embed(first, around | _of_layer(params, 0), tokens, counted)
    yield found
    sources = [layer.mixer.kept_by for layer in network.config.layers]
    kept: dict[int, KVCache] = {}
    for i, source in enumerate(sources):
        given = None if own is None else own[i], None if source is None else kept[source]
        x, cache, found = _layer(_alone(network, i), around | _of_layer(params, i), x, *given, counted)
        kept |= {i: cache} if i in sources else {}
        yield {name.replace(FIRST, f".layers.{i}."): moments for name, moments in found.items()}
    yield {HEAD: _head(first, around | _of_layer(params, 0), x, counted)}


def _alone(network, i):
    """The network with this layer alone: equal for equal layers."""
    return dataclasses.replace(network, config=dataclasses.replace(network.config, layers=network.config.layers[i : i + 1]))


def _of_layer(params, i):
    here = f".layers.{i}."
    return {name.replace(here, FIRST): w for name, w in params.items() if here in name}


@functools.partial(jax.jit, static_argnames="network")
def _embed(network, params, tokens, counted):
    """What the first layer reads of tokens [B, S], what each layer alone is told, and the moments of the weights for that."""
    linear = [name for name, t in network.tensors().items() if t.linear and ".layers." not in name and name != HEAD]

    def run(model):
        x = model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))
        own = model.own_inputs_of(tokens, x)
        return sum((jnp.sum(part.astype(jnp.float32)) for part in own or ()), jnp.float32(0)), (x, own)

    (x, own), found = _watched(network, params, linear, run, counted)
    return x, own, found


@functools.partial(jax.jit, static_argnames="network")
def _layer(network, params, x, own, shared, counted):
    """What a layer makes of x [B, S, K], its keys and values or those shared with it, and the moments of its weights."""
    linear = [name for name, tensor in network.tensors().items() if tensor.linear and FIRST in name]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])

    def run(model):
        rope = model.ropes[0]
        made, cache, _ = model.layers[0](x, Window(positions, None if rope is None else rotary(positions, rope), own=own), shared)
        return jnp.sum(made.astype(jnp.float32)), (made, cache)

    (made, cache), found = _watched(network, params, linear, run, counted)
    return made, cache, found


def _watched(network, params, linear, run, counted):
    """What run(model) returns beside a sum of all that it makes, and the moments of some weights."""

    def watching(moments):
        watched = {name: watch(params[name], zeros, counted.ravel()) for name, zeros in moments.items()}
        with network.module(params | watched) as module:
            return run(module.model)

    # Moments do not depend on what comes back, so the compiler drops the pass backward but for them.
    zeros = {name: jnp.zeros((params[name].shape[1],) * 2, jnp.float32) for name in linear}
    found, made = jax.grad(watching, has_aux=True)(zeros)
    return made, found


@functools.partial(jax.jit, static_argnames="network")
def _head(network, params, x, counted):
    with network.module(params) as module:
        x = module.model.norm(x).reshape(-1, x.shape[-1]).astype(jnp.float32)
        return jnp.matmul((x * counted.reshape(-1, 1)).T, x, precision=jax.lax.Precision.HIGHEST)
