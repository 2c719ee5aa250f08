"""Hunyuan (Tencent), dense: norms of queries and keys after the rotation, whose base a fixed factor stretches."""

from typing import Any

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, decoder, head_dim, renamed


def hunyuan(c) -> Config:
    """Return the network of transformers' HunYuanDenseV1Config."""
    rope, dim = c.rope_parameters, head_dim(c)
    if rope["rope_type"] == "dynamic":  # in name: with `alpha` it is the same for every length
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))}
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    mixer = attention(c, rope, qk_norm=Norm(float(c.rms_norm_eps)), qk_norm_last=True, **own)
    names = {f"model.layers.*.self_attn.{x[0]}_norm": f"model.layers.*.self_attn.{x}_layernorm" for x in ("query", "key")}
    layer = Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act), PRE)
    return decoder(c, [layer] * c.num_hidden_layers, sources=renamed(names))
