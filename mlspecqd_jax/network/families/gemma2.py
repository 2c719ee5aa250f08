"""Gemma 2 (arXiv 2408.00118): norms before and after each part, capped logits, and a sliding window in every other layer."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import SANDWICH, attention, decoder, windows


def gemma2(c) -> Config:
    """Return the network of transformers' Gemma2Config."""
    feed = GatedMLP(c.intermediate_size, c.hidden_activation)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    own |= {"scale": c.query_pre_attn_scalar**-0.5, "cap": c.attn_logit_softcapping}
    layers = [Layer(attention(c, window=window, **own), feed, SANDWICH) for window in windows(c)]
    norm = Norm(float(c.rms_norm_eps), offset=1.0)
    return decoder(c, layers, norm=norm, embed_scale=c.hidden_size**0.5, logit_cap=c.final_logit_softcapping)
