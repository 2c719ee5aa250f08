"""ERNIE 4.5 (Baidu), dense and with experts: Llama's layers with neighbouring pairs rotated."""

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, shared_expert
from mlspecqd_jax.weights.tensors import Source

MLP, BIAS = "model.layers.*.mlp", "e_score_correction_bias"


def ernie4_5(c) -> Config:
    """Return the network of transformers' Ernie4_5Config."""
    mixer = attention(c, interleaved=True, bias=c.use_bias, output_bias=c.use_bias)
    return decoder(c, [Layer(mixer, GatedMLP(c.intermediate_size, c.hidden_act, c.use_bias), PRE)] * c.num_hidden_layers)


def ernie4_5_moe(c) -> Config:
    """Return the network of transformers' Ernie4_5_MoeConfig, with experts in some layers."""
    least, size = float(c.moe_norm_min), c.moe_intermediate_size
    router = Router(c.moe_num_experts, c.moe_k, "softmax", choice_bias=True, normed=True, least_sum=least)
    shared = GatedMLP(size * c.moe_num_shared_experts, c.hidden_act, c.use_bias) if c.moe_num_shared_experts else None
    experts, dense = Experts(router, size, c.hidden_act, shared=shared), ernie4_5(c).layers
    sparse = [(i + 1) % c.moe_layer_interval == 0 for i in range(c.num_hidden_layers)]
    sparse = [sparse[i] and c.moe_layer_start_index <= i <= c.moe_layer_end_index for i in range(c.num_hidden_layers)]
    layers = [Layer(layer.mixer, experts if is_sparse else layer.feed, PRE) for layer, is_sparse in zip(dense, sparse, strict=True)]
    bias = (f"{MLP}.gate.{BIAS}", Source((f"{MLP}.moe_statics.{BIAS}",), stack=1))
    sources = (bias, *by_expert(router.experts), *shared_expert("shared_experts"))
    return decoder(c, layers, head_bias=c.use_bias, sources=sources)
