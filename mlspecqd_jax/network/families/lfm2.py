"""LFM2 (Liquid AI, arXiv 2511.23404) and LFM3: short convolutions in place of most layers' attention, also with experts."""

from typing import Any

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Norm, Router, ShortConv
from mlspecqd_jax.network.families.common import EXPERT, attention, by_expert, decoder, renamed
from mlspecqd_jax.weights.tensors import Source

NORMS = ("operator_norm", None, "ffn_norm", None)
OWN, FILE, FILE_EXPERT = "model.layers.*.mlp", "model.layers.*.feed_forward", ("w1", "w3", "w2")
ATTENTION = "model.layers.*.self_attn"
BOTH = {f"{OWN}.{name}": f"{FILE}.{stored}" for name, stored in zip(EXPERT, FILE_EXPERT, strict=True)}
BOTH |= {"model.norm": "model.embedding_norm"}
OF_LFM2 = {f"{ATTENTION}.{x}_norm": f"{ATTENTION}.{x}_layernorm" for x in "qk"} | {f"{ATTENTION}.o_proj": f"{ATTENTION}.out_proj"}


def lfm2(c) -> Config:
    """Return the network of transformers' Lfm2Config, whose MLPs may be smaller than it says."""
    size = c.intermediate_size
    if c.block_auto_adjust_ff_dim:
        size = int(2 * size / 3)
        if c.block_ffn_dim_multiplier is not None:
            size = int(c.block_ffn_dim_multiplier * size)
            size += -size % c.block_multiple_of
    return _lfm2(c, [GatedMLP(size)] * c.num_hidden_layers)


def lfm2_moe(c) -> Config:
    """Return the network of transformers' Lfm2MoeConfig: dense layers first, then experts, chosen by sigmoids and a bias."""
    known: dict[str, Any] = {"choice_bias": c.use_expert_bias, "normed": c.norm_topk_prob, "factor": c.routed_scaling_factor}
    experts = Experts(Router(c.num_experts, c.num_experts_per_tok, "sigmoid", **known), c.moe_intermediate_size)
    feeds = [GatedMLP(c.intermediate_size) if i < c.num_dense_layers else experts for i in range(c.num_hidden_layers)]
    stored = renamed({f"{OWN}.gate": f"{FILE}.gate"}) + by_expert(c.num_experts, f"{FILE}.experts", FILE_EXPERT)
    stored += ((f"{OWN}.gate.e_score_correction_bias", Source((f"{FILE}.expert_bias",))),)
    return _lfm2(c, feeds, stored)


def lfm3(c) -> Config:
    """Return the network of transformers' Lfm3Config: windows, a rope for each kind of attention, gates of its heads."""
    norm, gate = Norm(float(c.norm_eps)), "head" if c.use_attention_gate else None
    own: dict[str, Any] = {"qk_norm": norm, "gate": gate, "bias": c.attention_bias, "output_bias": c.attention_bias}
    mixers: dict[str, Any] = {"conv": ShortConv(c.conv_L_cache, c.conv_bias)}
    for kind, window in (("full_attention", None), ("sliding_attention", c.sliding_window)):
        mixers[kind] = attention(c, c.rope_parameters[kind], window=window, **own)
    norms = ("operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm") if c.use_sandwich_norm else NORMS
    layers = [Layer(mixers[kind], GatedMLP(c.intermediate_size), norms) for kind in c.layer_types]
    return decoder(c, layers, norm=norm, sources=renamed(BOTH | {f"{ATTENTION}.g_proj": f"{ATTENTION}.gate_proj"}))


def _lfm2(c, feeds, stored=()):
    norm = Norm(float(c.norm_eps))
    mixers = {"conv": ShortConv(c.conv_L_cache, c.conv_bias), "full_attention": attention(c, qk_norm=norm)}
    kinds = c.layer_types or ["full_attention"] * c.num_hidden_layers
    layers = [Layer(mixers[kind], feed, NORMS) for kind, feed in zip(kinds, feeds, strict=True)]
    return decoder(c, layers, norm=norm, sources=renamed(BOTH | OF_LFM2) + stored)
