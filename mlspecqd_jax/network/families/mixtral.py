"""Mixtral (arXiv 2401.04088) and MiniMax-M2: experts in all layers, in the file as block_sparse_moe."""

from mlspecqd_jax.network.config import Config, Experts, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, renamed, windows
from mlspecqd_jax.weights.tensors import Source

OWN, FILE, BIAS = "model.layers.*.mlp", "model.layers.*.block_sparse_moe", "e_score_correction_bias"


def mixtral(c) -> Config:
    """Return the network of transformers' MixtralConfig."""
    router = Router(c.num_local_experts, c.num_experts_per_tok, "softmax", normed=True)
    return _mixtral(c, [attention(c, window=window) for window in windows(c)], router)


def minimax_m2(c) -> Config:
    """Return the network of transformers' MiniMaxM2Config, with norms of whole queries and keys."""
    router = Router(c.num_local_experts, c.num_experts_per_tok, "sigmoid", choice_bias=True, normed=True)
    mixer = attention(c, qk_norm=Norm(float(c.rms_norm_eps)), qk_norm_of="all")
    return _mixtral(c, [mixer] * c.num_hidden_layers, router)


def _mixtral(c, mixers, router):
    feed = Experts(router, c.intermediate_size, c.hidden_act)
    sources = renamed({f"{OWN}.gate": f"{FILE}.gate"}) + by_expert(router.experts, f"{FILE}.experts", ("w1", "w3", "w2"))
    sources += ((f"{OWN}.gate.{BIAS}", Source((f"{FILE}.{BIAS}",))),)
    return decoder(c, [Layer(mixer, feed, PRE) for mixer in mixers], sources=sources)
