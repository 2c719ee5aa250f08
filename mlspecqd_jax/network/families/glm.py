"""GLM-4 (arXiv 2406.12793) and GLM-4-0414: half of a head rotated, in neighbouring pairs."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, fused_gate


def glm(c) -> Config:
    """Return the network of transformers' GlmConfig."""
    return _glm(c, PRE)


def glm4(c) -> Config:
    """Return the network of transformers' Glm4Config, which has norms after each part too."""
    return _glm(c, ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"))


def _glm(c, norms):
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    layer = Layer(attention(c, interleaved=True, bias=c.attention_bias), feed, norms)
    return decoder(c, [layer] * c.num_hidden_layers, sources=fused_gate(feed))
