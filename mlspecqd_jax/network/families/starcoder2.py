"""StarCoder2 (arXiv 2402.19173): layer norms, an MLP without a gate, a sliding window."""

from mlspecqd_jax.network.config import MLP, Config, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder, renamed

NAMES = {"model.layers.*.mlp.up_proj": "model.layers.*.mlp.c_fc", "model.layers.*.mlp.down_proj": "model.layers.*.mlp.c_proj"}


def starcoder2(c) -> Config:
    """Return the network of transformers' Starcoder2Config."""
    mixer = attention(c, window=c.sliding_window, bias=c.use_bias, output_bias=c.use_bias)
    layer = Layer(mixer, MLP(c.intermediate_size, c.hidden_act, c.use_bias), PRE)
    norm = Norm(float(c.norm_epsilon), centered=True, bias=True)
    return decoder(c, [layer] * c.num_hidden_layers, norm=norm, sources=renamed(NAMES))
