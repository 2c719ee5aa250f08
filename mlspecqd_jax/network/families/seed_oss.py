"""Seed-OSS (ByteDance): Llama's layers with biases of queries, keys and values."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder


def seed_oss(c) -> Config:
    """Return the network of transformers' SeedOssConfig."""
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_out_bias)
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias), PRE)
    return decoder(c, [layer] * c.num_hidden_layers)
