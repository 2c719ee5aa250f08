"""Mistral (Jiang et al., arXiv 2310.06825), Ministral, and CWM (arXiv 2510.02387): Llama's layers with a sliding window."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def mistral(c) -> Config:
    """Return the network of transformers' MistralConfig, MinistralConfig or CwmConfig."""
    feed = GatedMLP(c.intermediate_size, c.hidden_act, getattr(c, "mlp_bias", False))
    return decoder(c, [Layer(attention(c, window=window), feed, PRE) for window in windows(c)])
