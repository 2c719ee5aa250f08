"""Mistral (Jiang et al., arXiv 2310.06825): Llama's layers with a sliding window."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def mistral(c) -> Config:
    """Return the network of transformers' MistralConfig."""
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    return decoder(c, [Layer(attention(c, window=window), feed, PRE) for window in windows(c)])
