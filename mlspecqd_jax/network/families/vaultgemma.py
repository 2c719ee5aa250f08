"""VaultGemma (arXiv 2510.15001): Gemma 2 without its norms after each part."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import attention, decoder, windows


def vaultgemma(c) -> Config:
    """Return the network of transformers' VaultGemmaConfig."""
    feed, norms = GatedMLP(c.intermediate_size, c.hidden_activation), ("input_layernorm", None, "pre_feedforward_layernorm", None)
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    own |= {"scale": c.query_pre_attn_scalar**-0.5, "cap": c.attn_logit_softcapping}
    layers = [Layer(attention(c, window=window, **own), feed, norms) for window in windows(c)]
    norm = Norm(float(c.rms_norm_eps), offset=1.0)
    return decoder(c, layers, norm=norm, embed_scale=c.hidden_size**0.5, logit_cap=c.final_logit_softcapping)
