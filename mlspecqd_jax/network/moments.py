"""`second_moments`: what each linear layer of a model is given to multiply, as the sum of x x^T, layer by layer.

Notation: B texts, S positions each, K contracted.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from mlspecqd_jax.network.layers import Window
from mlspecqd_jax.network.network import FIRST, Network
from mlspecqd_jax.network.ops import rotary
from mlspecqd_jax.weights.quantized_array import watch
from mlspecqd_jax.weights.tensors import HEAD


def second_moments(
    network: Network, params: Mapping[str, jax.Array], tokens: jax.Array, counted: jax.Array
) -> Iterator[dict[str, jax.Array]]:
    """Yield, layer after layer and at last for the head, the sum over positions of x x^T, f32 [K, K], by weight.

    Only what a layer makes of the texts is kept for the next, so memory holds one layer's sums at a time. Layers of one kind are
    one compiled program.

    Args:
      network: of the model.
      params: its parameters, not quantized.
      tokens: int32 [B, S].
      counted: how often each position counts, f32 [B, S].
    """
    around = {name: w for name, w in params.items() if ".layers." not in name}
    first = _alone(network, 0)
    x = _embed(first, around | _of_layer(params, 0), tokens)
    for i in range(len(network.config.layers)):
        x, found = _layer(_alone(network, i), around | _of_layer(params, i), x, counted)
        yield {name.replace(FIRST, f".layers.{i}."): moments for name, moments in found.items()}
    yield {HEAD: _head(first, around | _of_layer(params, 0), x, counted)}


def _alone(network, i):
    """The network with this layer alone: equal for equal layers."""
    return dataclasses.replace(network, config=dataclasses.replace(network.config, layers=network.config.layers[i : i + 1]))


def _of_layer(params, i):
    here = f".layers.{i}."
    return {name.replace(here, FIRST): w for name, w in params.items() if here in name}


@functools.partial(jax.jit, static_argnames="network")
def _embed(network, params, tokens):
    with network.module(params) as module:
        return module.model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))


@functools.partial(jax.jit, static_argnames="network")
def _layer(network, params, x, counted):
    """What a layer makes of x [B, S, K], and the moments of its weights."""
    linear = [name for name, tensor in network.tensors().items() if tensor.linear and FIRST in name]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])

    def run(moments):
        watched = {name: watch(params[name], zeros, counted.ravel()) for name, zeros in moments.items()}
        with network.module(params | watched) as module:
            layer, rope = module.model.layers[0], module.model.ropes[0]
            made, *_ = layer(x, Window(positions, None if rope is None else rotary(positions, rope)), None)
        return jnp.sum(made.astype(jnp.float32)), made

    # Moments do not depend on what comes back, so the compiler drops the pass backward but for them.
    zeros = {name: jnp.zeros((params[name].shape[1],) * 2, jnp.float32) for name in linear}
    found, made = jax.grad(run, has_aux=True)(zeros)
    return made, found


@functools.partial(jax.jit, static_argnames="network")
def _head(network, params, x, counted):
    with network.module(params) as module:
        x = module.model.norm(x).reshape(-1, x.shape[-1]).astype(jnp.float32)
        return jnp.matmul((x * counted.reshape(-1, 1)).T, x, precision=jax.lax.Precision.HIGHEST)
