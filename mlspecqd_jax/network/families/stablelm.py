"""StableLM (arXiv 2402.17834): layer norms, a part of each head rotated."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def stablelm(c) -> Config:
    """Return the network of transformers' StableLmConfig without norms of queries and keys."""
    norms = ("input_layernorm", None, None, None) if c.use_parallel_residual else PRE
    layer = Layer(attention(c, bias=c.use_qkv_bias), GatedMLP(c.intermediate_size, c.hidden_act), norms, c.use_parallel_residual)
    return decoder(c, [layer] * c.num_hidden_layers, norm=Norm(float(c.layer_norm_eps), centered=True, bias=True))
