"""Hunyuan (Tencent), dense and with experts: norms of queries and keys after the rotation, whose base a fixed factor stretches."""

from typing import Any

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, head_dim, renamed, shared_expert

NAMES = {f"model.layers.*.self_attn.{x[0]}_norm": f"model.layers.*.self_attn.{x}_layernorm" for x in ("query", "key")}


def hunyuan(c) -> Config:
    """Return the network of transformers' HunYuanDenseV1Config."""
    return _hunyuan(c, [GatedMLP(c.intermediate_size, c.hidden_act)] * c.num_hidden_layers)


def hunyuan_moe(c) -> Config:
    """Return the network of transformers' HunYuanMoEV1Config, with a shared expert in all layers."""
    chosen = c.moe_topk if isinstance(c.moe_topk, list) else [c.moe_topk] * c.num_hidden_layers
    routers = [Router(c.num_experts, int(number), "softmax", normed=True) for number in chosen]
    shared = GatedMLP(c.intermediate_size, c.hidden_act)
    feeds = [Experts(router, c.intermediate_size, c.hidden_act, shared=shared) for router in routers]
    gate = renamed({"model.layers.*.mlp.gate": "model.layers.*.mlp.gate.wg"})
    return _hunyuan(c, feeds, gate + by_expert(c.num_experts) + shared_expert("shared_mlp"))


def _hunyuan(c, feeds, sources=()):
    rope, dim = c.rope_parameters, head_dim(c)
    if rope["rope_type"] == "dynamic":  # in name: with `alpha` it is the same for every length
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))}
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    mixer = attention(c, rope, qk_norm=Norm(float(c.rms_norm_eps)), qk_norm_last=True, **own)
    return decoder(c, [Layer(mixer, feed, PRE) for feed in feeds], sources=renamed(NAMES) + sources)
