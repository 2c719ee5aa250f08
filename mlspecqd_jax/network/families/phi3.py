"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219, 2412.08905): Llama's layers, whose products are fused in the file."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, fused_gate, fused_qkv


def phi3(c) -> Config:
    """Return the network of transformers' Phi3Config."""
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    layers = [Layer(attention(c, window=c.sliding_window), feed, PRE)] * c.num_hidden_layers
    return decoder(c, layers, sources=fused_qkv(layers[0].mixer) + fused_gate(feed))
