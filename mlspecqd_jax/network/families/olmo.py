"""OLMo (arXiv 2402.00838): layer norms without weights, and bounded queries, keys and values."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def olmo(c) -> Config:
    """Return the network of transformers' OlmoConfig."""
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias, clip=c.clip_qkv)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act), PRE)
    return decoder(c, [layer] * c.num_hidden_layers, norm=Norm(1e-5, centered=True, weight=False))
