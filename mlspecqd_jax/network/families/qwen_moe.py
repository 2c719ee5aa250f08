"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671), Qwen3-MoE (arXiv 2505.09388): experts in some or all layers."""

from typing import Any

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, windows


def qwen2_moe(c) -> Config:
    """Return the network of transformers' Qwen2MoeConfig, whose shared expert has a gate."""
    mixers = [attention(c, window=window, bias=c.qkv_bias) for window in windows(c)]
    return _qwen_moe(c, mixers, shared=GatedMLP(c.shared_expert_intermediate_size, c.hidden_act), shared_gate=True)


def qwen3_moe(c) -> Config:
    """Return the network of transformers' Qwen3MoeConfig."""
    norm = Norm(float(c.rms_norm_eps))
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias, "qk_norm": norm}
    return _qwen_moe(c, [attention(c, window=window, **own) for window in windows(c)])


def _qwen_moe(c, mixers, **shared):
    router = Router(c.num_experts, c.num_experts_per_tok, "softmax", normed=c.norm_topk_prob)
    experts, dense = Experts(router, c.moe_intermediate_size, c.hidden_act, **shared), GatedMLP(c.intermediate_size, c.hidden_act)
    sparse = [i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0 for i in range(c.num_hidden_layers)]
    layers = [Layer(mixer, experts if is_sparse else dense, PRE) for mixer, is_sparse in zip(mixers, sparse, strict=True)]
    return decoder(c, layers, sources=by_expert(c.num_experts))
