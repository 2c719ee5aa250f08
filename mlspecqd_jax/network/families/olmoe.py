"""OLMoE (arXiv 2409.02060): norms of whole queries and keys, and experts in all layers."""

from typing import Any

from mlspecqd_jax.network.config import Config, Experts, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder


def olmoe(c) -> Config:
    """Return the network of transformers' OlmoeConfig."""
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias, "clip": c.clip_qkv}
    mixer = attention(c, qk_norm=Norm(float(c.rms_norm_eps)), qk_norm_of="all", **own)
    router = Router(c.num_experts, c.num_experts_per_tok, "softmax", normed=c.norm_topk_prob)
    layer = Layer(mixer, Experts(router, c.intermediate_size, c.hidden_act), PRE)
    return decoder(c, [layer] * c.num_hidden_layers, sources=by_expert(router.experts))
