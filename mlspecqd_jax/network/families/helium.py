"""Helium (Kyutai): Llama's layers with neighbouring pairs rotated."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def helium(c) -> Config:
    """Return the network of transformers' HeliumConfig."""
    mixer = attention(c, interleaved=True, bias=c.attention_bias)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias), PRE)
    return decoder(c, [layer] * c.num_hidden_layers)
