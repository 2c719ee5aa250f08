"""GLM-4.5 and GLM-4.6 (arXiv 2508.06471): half of a head rotated; experts, of groups, beside a shared one behind dense layers."""

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, shared_expert


def glm4_moe(c) -> Config:
    """Return the network of transformers' Glm4MoeConfig."""
    mixer = attention(c, bias=c.attention_bias, qk_norm=Norm(float(c.rms_norm_eps)) if c.use_qk_norm else None)
    groups = {"groups": c.n_group, "groups_chosen": c.topk_group}
    normed = {"normed": c.norm_topk_prob, "least_sum": 1e-20, "factor": float(c.routed_scaling_factor)}
    router = Router(c.n_routed_experts, c.num_experts_per_tok, "sigmoid", choice_bias=True, **groups, **normed)
    shared = GatedMLP(c.moe_intermediate_size * c.n_shared_experts, c.hidden_act)
    experts = Experts(router, c.moe_intermediate_size, c.hidden_act, shared=shared)
    dense = GatedMLP(c.intermediate_size, c.hidden_act)
    layers = [Layer(mixer, dense if i < c.first_k_dense_replace else experts, PRE) for i in range(c.num_hidden_layers)]
    return decoder(c, layers, sources=by_expert(router.experts) + shared_expert("shared_experts"))
