"""Qwen3 (arXiv 2505.09388): a norm of each query's and key's head."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder, windows


def qwen3(c) -> Config:
    """Return the network of transformers' Qwen3Config."""
    feed = GatedMLP(c.intermediate_size, c.hidden_act)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias, "qk_norm": Norm(float(c.rms_norm_eps))}
    return decoder(c, [Layer(attention(c, window=window, **own), feed, PRE) for window in windows(c)])
