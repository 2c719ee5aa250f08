"""ERNIE 4.5 (Baidu): Llama's layers with neighbouring pairs rotated."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def ernie4_5(c) -> Config:
    """Return the network of transformers' Ernie4_5Config."""
    mixer = attention(c, interleaved=True, bias=c.use_bias, output_bias=c.use_bias)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.use_bias), PRE)
    return decoder(c, [layer] * c.num_hidden_layers)
