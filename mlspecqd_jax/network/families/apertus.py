"""Apertus (arXiv 2509.14233): normed queries and keys, and an MLP without a gate whose activation is learned."""

from typing import Any

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import attention, decoder


def apertus(c) -> Config:
    """Return the network of transformers' ApertusConfig."""
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias, "qk_norm": Norm(float(c.rms_norm_eps))}
    feed, norms = MLP(c.intermediate_size, c.hidden_act), ("attention_layernorm", None, "feedforward_layernorm", None)
    return decoder(c, [Layer(attention(c, **own), feed, norms)] * c.num_hidden_layers)
