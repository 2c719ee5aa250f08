"""GLM-4.5 and GLM-4.6 (arXiv 2508.06471): half of a head rotated; experts, of groups, beside a shared one behind dense layers."""

from mlspecqd_jax.network.config import Config, GatedMLP, Layer, Norm
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, shared_expert
from mlspecqd_jax.network.families.deepseek import experts_of


def glm4_moe(c) -> Config:
    """Return the network of transformers' Glm4MoeConfig."""
    mixer = attention(c, bias=c.attention_bias, qk_norm=Norm(float(c.rms_norm_eps)) if c.use_qk_norm else None)
    experts, dense = experts_of(c), GatedMLP(c.intermediate_size, c.hidden_act)
    layers = [Layer(mixer, dense if i < c.first_k_dense_replace else experts, PRE) for i in range(c.num_hidden_layers)]
    return decoder(c, layers, sources=by_expert(experts.router.experts) + shared_expert("shared_experts"))
