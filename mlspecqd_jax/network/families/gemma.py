"""Gemma (arXiv 2403.08295): Llama's layers with norms of 1 + weight and scaled embeddings."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def gemma(c) -> Config:
    """Return the network of transformers' GemmaConfig."""
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act), PRE)
    norm = Norm(float(c.rms_norm_eps), offset=1.0)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, embed_scale=c.hidden_size**0.5)
