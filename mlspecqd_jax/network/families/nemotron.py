"""Nemotron-4 (arXiv 2402.16819), Arcee's AFM and Jais 2: MLPs without a gate that square what is positive."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def nemotron(c) -> Config:
    """Return the network of transformers' NemotronConfig."""
    return _nemotron(c, Norm(float(c.norm_eps), offset=1.0, centered=True, bias=True))


def arcee(c) -> Config:
    """Return the network of transformers' ArceeConfig."""
    return _nemotron(c, Norm(float(c.rms_norm_eps)))


def jais2(c) -> Config:
    """Return the network of transformers' Jais2Config."""
    return _nemotron(c, Norm(float(c.layer_norm_eps), centered=True, bias=True))


def _nemotron(c, norm):
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias)
    layer = Layer(mixer, MLP(c.intermediate_size, c.hidden_act, c.mlp_bias), PRE)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm)
