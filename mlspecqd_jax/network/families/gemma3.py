"""The language model of Gemma 3 (arXiv 2503.19786): local and global layers with ropes of their own, normed queries and keys."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import SANDWICH, attention, decoder, windows


def gemma3(c) -> Config:
    """Return the network of transformers' Gemma3TextConfig, whose attn_logit_softcapping is of no effect."""
    norm = Norm(float(c.rms_norm_eps), offset=1.0)
    feed = GatedMLP(c.intermediate_size, c.hidden_activation)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    own |= {"scale": c.query_pre_attn_scalar**-0.5, "qk_norm": norm}
    kinds = zip(c.layer_types, windows(c), strict=True)
    layers = [Layer(attention(c, c.rope_parameters[kind], window=window, **own), feed, SANDWICH) for kind, window in kinds]
    return decoder(c, layers, norm=norm, embed_scale=c.hidden_size**0.5, logit_cap=c.final_logit_softcapping)
