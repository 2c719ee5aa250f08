"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases of queries, keys and values."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def qwen2(c) -> Config:
    """Return the network of transformers' Qwen2Config."""
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    return decoder(c, [Layer(attention(c, window=window, bias=True), feed, PRE) for window in windows(c)])
