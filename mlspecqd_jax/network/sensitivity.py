"""What each weight's precision costs: how far a model's probabilities move, when one weight is cast, on text that it writes itself.

For a small change D of a weight with inputs x, the Kullback-Leibler divergence of the model's next token from what it was is, to
second order, half the mean of (g' D x)^2 over tokens y drawn from its own probabilities, where g is the gradient of log p(y) by the
weight's outputs (the Fisher information). Positions count as independent. So one pass forward and back, for a format in which all
weights are cast at once, gives the cost of each: no pass for each weight, no data set, no training.

Notation: B texts, S positions each, M = B S rows of activations, N outputs, K contracted.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.cast import dequantize, quantize
from mlspecqd_jax.weights.quantization import rule_of, with_head
from mlspecqd_jax.weights.quantized_array import probe
from mlspecqd_jax.weights.tensors import EMBEDDING


def weights_of(network: Network, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the weights that can be cast, by name; the head of a tied model is the embedding."""
    names = [name for name, tensor in with_head(network.tensors()).items() if tensor.linear]
    return {name: params[name] if name in params else params[EMBEDDING] for name in names}


def costs(
    network: Network, params: Mapping[str, jax.Array], tokens: jax.Array, formats: tuple[str, ...], scale_rule: str, key: jax.Array
) -> dict[str, dict[str, float]]:
    """Return, by weight and format, the divergence in nats a token that casting the one to the other costs.

    Args:
      network: of the model.
      params: its parameters, not quantized.
      tokens: int32 [B, S], on which it is measured (`own_text`).
      formats: names of `formats.FORMATS`.
      scale_rule: of `cast.quantize`, where it is one of the format's.
      key: of jax.random, for the tokens whose probabilities are differentiated.
    """
    weights = weights_of(network, params)
    found: dict[str, dict[str, float]] = {name: {} for name in weights}
    for format in tqdm(formats, desc="Measuring precision", unit="format", disable=None, leave=False):
        changes = {name: _change(w, format, rule_of(format, scale_rule)) for name, w in weights.items()}
        for name, cost in _costs(network, dict(params), changes, tokens, key).items():
            found[name][format] = float(cost)
    return found


@functools.partial(jax.jit, static_argnames=("format", "scale_rule"))
def _change(w, format, scale_rule):
    cast = dequantize(quantize(w, format, scale_rule), jnp.float32)
    return (cast - w.astype(jnp.float32)).astype(w.dtype)


@functools.partial(jax.jit, static_argnames="network")
def _costs(network, params, changes, tokens, key):
    """Of each weight [N, K] the cost of its change [N, K]."""
    start = jnp.zeros(len(tokens), jnp.int32)
    drawn = jax.random.categorical(key, network(params, tokens, start, None)[0])  # [B, S]

    def log_probability(amounts):
        probed = {
            name: probe(params[name] if name in params else params[EMBEDDING], changes[name], amount)
            for name, amount in amounts.items()
        }
        logits, _, _ = network(params | probed, tokens, start, None)
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1))

    moved = jax.grad(log_probability)({name: jnp.zeros(tokens.size, jnp.float32) for name in changes})
    return {name: jnp.mean(each**2) / 2 for name, each in moved.items()}
