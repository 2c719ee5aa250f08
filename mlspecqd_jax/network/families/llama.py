"""Llama (Touvron et al., arXiv 2302.13971, 2307.09288; Llama 3, arXiv 2407.21783)."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def llama(c) -> Config:
    """Return the network of transformers' LlamaConfig."""
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias), PRE)
    return decoder(c, [layer] * c.num_hidden_layers)
