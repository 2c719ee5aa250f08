"""Granite 3 (IBM) and HyperCLOVA X (arXiv 2506.22403): Llama's layers with scaled embeddings, residuals, scores and logits."""

import dataclasses

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, head_dim, windows
from mlspecqd_jax.network.rope import rope_of


def granite(c) -> Config:
    """Return the network of transformers' GraniteConfig."""
    return _granite(c, PRE, 1 / c.logits_scaling)


def hyperclovax(c) -> Config:
    """Return the network of transformers' HyperCLOVAXConfig, whose logits are multiplied where Granite's are divided."""
    norms = ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2") if c.use_post_norm else PRE
    return _granite(c, norms, c.logits_scaling)


def granite_swa(c) -> Config:
    """Return the network of transformers' GraniteSWAConfig: with sinks, sliding windows, and a rope of its own in each layer."""
    base = granite(c)
    ropes = [rope_of(c.rope_parameters | {"rope_theta": theta}, head_dim(c)) if theta else None for theta in c.layer_rope_theta]
    mixers = [
        dataclasses.replace(base.layers[0].mixer, rope=rope, window=window, sinks=True)
        for rope, window in zip(ropes, windows(c), strict=True)
    ]
    return dataclasses.replace(base, layers=tuple(dataclasses.replace(base.layers[0], mixer=mixer) for mixer in mixers))


def _granite(c, norms, logit_scale):
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias, scale=c.attention_multiplier)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias), norms, scale=c.residual_multiplier)
    return decoder(c, [layer] * c.num_hidden_layers, embed_scale=c.embedding_multiplier, logit_scale=logit_scale)
