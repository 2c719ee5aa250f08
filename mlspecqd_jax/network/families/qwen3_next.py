"""Qwen3-Next, Qwen3.5 and Qwen3.6 (Alibaba): gated delta nets in three of four layers, gates of what attention returns."""

from mlspecqd_jax.network.config import Config, DeltaNet, Experts, GatedMLP, Layer, Norm, Router
from mlspecqd_jax.network.families.common import PRE, attention, by_expert, decoder, split

ATTENTION, DELTA = "model.layers.*.self_attn", "model.layers.*.linear_attn"


def qwen3_next(c) -> Config:
    """Return the network of transformers' Qwen3NextConfig, whose files hold a key head's projections together."""
    sparse = [i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0 for i in range(c.num_hidden_layers)]
    experts, dense = _experts(c, c.norm_topk_prob), GatedMLP(c.intermediate_size, c.hidden_act)
    d = _delta_net(c)
    keys, share = d.key_dim, d.heads // d.key_heads
    parts = {"q": keys, "k": keys, "v": share * d.value_dim, "z": share * d.value_dim}
    sources = split(f"{DELTA}.in_proj_qkvz", {f"{DELTA}.in_proj_{x}": size for x, size in parts.items()}, d.key_heads)
    sources += split(f"{DELTA}.in_proj_ba", {f"{DELTA}.in_proj_{x}": share for x in "ba"}, d.key_heads)
    return _qwen3_next(c, [experts if is_sparse else dense for is_sparse in sparse], sources + by_expert(c.num_experts))


def qwen3_5(c) -> Config:
    """Return the network of transformers' Qwen3_5TextConfig."""
    return _qwen3_next(c, [GatedMLP(c.intermediate_size, c.hidden_act)] * c.num_hidden_layers, _fused_qkv(c))


def qwen3_5_moe(c) -> Config:
    """Return the network of transformers' Qwen3_5MoeTextConfig."""
    return _qwen3_next(c, [_experts(c, normed=True)] * c.num_hidden_layers, _fused_qkv(c) + by_expert(c.num_experts))


def _qwen3_next(c, feeds, sources):
    norm = Norm(float(c.rms_norm_eps), offset=1.0)
    mixer = attention(c, qk_norm=norm, gate="element", bias=c.attention_bias, output_bias=c.attention_bias)
    mixers = {"full_attention": mixer, "linear_attention": _delta_net(c)}
    halves = {f"{ATTENTION}.q_proj": mixer.head_dim, f"{ATTENTION}.g_proj": mixer.value_dim}
    layers = [Layer(mixers[kind], feed, PRE) for kind, feed in zip(c.layer_types, feeds, strict=True)]
    return decoder(c, layers, norm=norm, sources=sources + split(f"{ATTENTION}.q_proj", halves, mixer.heads))


def _delta_net(c) -> DeltaNet:
    heads = c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
    return DeltaNet(*heads, c.linear_conv_kernel_dim, Norm(float(c.rms_norm_eps)), c.hidden_act)


def _experts(c, normed: bool) -> Experts:
    router = Router(c.num_experts, c.num_experts_per_tok, "softmax", normed=normed)
    shared = GatedMLP(c.shared_expert_intermediate_size, c.hidden_act)
    return Experts(router, c.moe_intermediate_size, c.hidden_act, shared=shared, shared_gate=True)


def _fused_qkv(c):
    d = _delta_net(c)
    parts = {"q": d.key_heads * d.key_dim, "k": d.key_heads * d.key_dim, "v": d.heads * d.value_dim}
    return split(f"{DELTA}.in_proj_qkv", {f"{DELTA}.in_proj_{x}": size for x, size in parts.items()})
