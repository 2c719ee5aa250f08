"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437) and what has their latent attention: GLM-4.7-Flash, Mistral 4, Youtu."""

import dataclasses
import math

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Growth, LatentAttention, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, Sources, by_expert, decoder, renamed, shared_expert, stacked_experts
from mlspecqd_jax.network.rope import rope_of
from mlspecqd_jax.weights.tensors import Source

ATTENTION = "model.layers.*.self_attn"


def deepseek_v2(c) -> Config:
    """Return the network of transformers' DeepseekV2Config, which chooses groups by their best expert, if at all."""
    groups = (1, 1) if c.topk_method == "greedy" else (c.n_group, c.topk_group)
    router = Router(c.n_routed_experts, c.num_experts_per_tok, "softmax", groups=groups[0], groups_chosen=groups[1], group_best=1)
    router = dataclasses.replace(router, factor=float(c.routed_scaling_factor))
    shared = GatedMLP(c.moe_intermediate_size * c.n_shared_experts, c.hidden_act, c.mlp_bias)
    experts = Experts(router, c.moe_intermediate_size, c.hidden_act, shared=shared)
    return _deepseek(c, _behind_dense_layers(c, experts, c.mlp_bias), interleaved=True)


def deepseek_v3(c) -> Config:
    """Return the network of transformers' DeepseekV3Config."""
    return _deepseek(c, _behind_dense_layers(c, experts_of(c)))


def glm4_moe_lite(c) -> Config:
    """Return the network of transformers' Glm4MoeLiteConfig."""
    feeds = {"dense": GatedMLP(c.intermediate_size, c.hidden_act), "sparse": experts_of(c)}
    return _deepseek(c, [feeds[kind] for kind in c.mlp_layer_types])


def mistral4(c) -> Config:
    """Return the network of transformers' Mistral4Config: scores by a softmax, queries that grow, all experts in one tensor."""
    rope = c.rope_parameters
    beta, period = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    factors = tuple(1 + beta * math.log(1 + i) for i in range(-(-c.max_position_embeddings // period)))
    experts = experts_of(c)
    experts = dataclasses.replace(experts, router=dataclasses.replace(experts.router, scores="softmax", choice_bias=False))
    found = _deepseek(c, _behind_dense_layers(c, experts), growth=Growth(period, factors))
    stacked = dict(found.sources) | dict(stacked_experts(experts.router.experts, experts.size))
    return dataclasses.replace(found, sources=tuple(stacked.items()))


def youtu(c) -> Config:
    """Return the network of transformers' YoutuConfig, which has no experts."""
    return _deepseek(c, [GatedMLP(c.intermediate_size, c.hidden_act)] * c.num_hidden_layers)


def experts_of(c) -> Experts:
    """Return experts of groups beside a shared one, chosen by sigmoids and a bias, as DeepSeek-V3 and GLM-4.5 have them."""
    groups = {"groups": c.n_group, "groups_chosen": c.topk_group}
    normed = {"normed": c.norm_topk_prob, "least_sum": 1e-20, "factor": float(c.routed_scaling_factor)}
    router = Router(c.n_routed_experts, c.num_experts_per_tok, "sigmoid", choice_bias=True, **groups, **normed)
    shared = GatedMLP(c.moe_intermediate_size * c.n_shared_experts, c.hidden_act)
    return Experts(router, c.moe_intermediate_size, c.hidden_act, shared=shared)


def _behind_dense_layers(c, experts: Experts, bias: bool = False) -> list[GatedMLP | Experts]:
    dense = GatedMLP(c.intermediate_size, c.hidden_act, bias)
    return [dense if i < c.first_k_dense_replace else experts for i in range(c.num_hidden_layers)]


def _deepseek(c, feeds: list[GatedMLP | Experts], interleaved: bool | None = None, growth: Growth | None = None) -> Config:
    mixer = _mixer(c, bool(c.rope_interleave) if interleaved is None else interleaved, growth)
    number = next((feed.router.experts for feed in feeds if isinstance(feed, Experts)), None)
    sources = _sources(mixer) + (() if number is None else by_expert(number) + shared_expert("shared_experts"))
    return decoder(c, [Layer(mixer, feed, PRE) for feed in feeds], sources=sources)


def _mixer(c, interleaved: bool, growth: Growth | None) -> LatentAttention:
    rope, scale = c.rope_parameters, (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    stretched = rope.get("mscale_all_dim") if rope["rope_type"] != "default" else None
    if stretched and rope["factor"] > 1:
        scale *= (0.1 * stretched * math.log(rope["factor"]) + 1) ** 2
    sizes = {"key_dim": c.qk_nope_head_dim, "turned_dim": c.qk_rope_head_dim, "value_dim": c.v_head_dim, "scale": scale}
    return LatentAttention(
        c.num_attention_heads,
        c.kv_lora_rank,
        c.q_lora_rank,
        **sizes,
        # Of what is turned alone, whatever part of a head that is.
        rope=rope_of(rope | {"partial_rotary_factor": 1.0}, c.qk_rope_head_dim, c.max_position_embeddings, interleaved),
        norm=Norm(),
        growth=growth,
        bias=c.attention_bias,
        output_bias=c.attention_bias,
    )


def _sources(a: LatentAttention) -> Sources:
    """Say that a file holds the weights of a head's keys and values one after another, the former with latents contracted."""
    both, size = (f"{ATTENTION}.kv_b_proj",), a.key_dim + a.value_dim
    keys = Source(both, a.heads, 0, a.key_dim, turn=True)
    names = renamed({f"{ATTENTION}.kv_a_proj": f"{ATTENTION}.kv_a_proj_with_mqa"})
    return (*names, (f"{ATTENTION}.k_b_proj", keys), (f"{ATTENTION}.v_b_proj", Source(both, a.heads, a.key_dim, size)))
