"""Granite 3 (IBM), also with experts, and HyperCLOVA X (arXiv 2506.22403): scaled embeddings, residuals, scores and logits."""

import dataclasses

from mlspecqd_jax.network.config import Config, Experts, GatedMLP, Layer, Router
from mlspecqd_jax.network.families.common import PRE, attention, decoder, head_dim, renamed, split, windows
from mlspecqd_jax.network.rope import rope_of

# Of experts, here and in the file.
MLP, FILE, SHARED = "model.layers.*.mlp", "model.layers.*.block_sparse_moe", "model.layers.*.shared_mlp"


def granite(c) -> Config:
    """Return the network of transformers' GraniteConfig."""
    return _granite(c, PRE, 1 / c.logits_scaling)


def hyperclovax(c) -> Config:
    """Return the network of transformers' HyperCLOVAXConfig, whose logits are multiplied where Granite's are divided."""
    norms = ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2") if c.use_post_norm else PRE
    return _granite(c, norms, c.logits_scaling)


def granite_swa(c) -> Config:
    """Return the network of transformers' GraniteSWAConfig: with sinks, sliding windows, and a rope of its own in each layer."""
    base = granite(c)
    ropes = [rope_of(c.rope_parameters | {"rope_theta": theta}, head_dim(c)) if theta else None for theta in c.layer_rope_theta]
    mixers = [
        dataclasses.replace(base.layers[0].mixer, rope=rope, window=window, sinks=True)
        for rope, window in zip(ropes, windows(c), strict=True)
    ]
    return dataclasses.replace(base, layers=tuple(dataclasses.replace(base.layers[0], mixer=mixer) for mixer in mixers))


def granitemoe(c) -> Config:
    """Return the network of transformers' GraniteMoeConfig or GraniteMoeSharedConfig, whose files hold all experts in one."""
    router = Router(c.num_local_experts, c.num_experts_per_tok, "softmax of chosen")
    size = getattr(c, "shared_intermediate_size", 0)
    feed = Experts(router, c.intermediate_size, c.hidden_act, shared=GatedMLP(size, c.hidden_act) if size else None)
    sources = renamed({f"{MLP}.gate": f"{FILE}.router.layer", f"{MLP}.shared_expert.down_proj": f"{SHARED}.output_linear"})
    sources += split(f"{SHARED}.input_linear", {f"{MLP}.shared_expert.{x}_proj": size for x in ("gate", "up")})
    stacked = split(f"{FILE}.input_linear", {f"{MLP}.experts.{x}_proj": feed.size for x in ("gate", "up")}, router.experts)
    stacked += renamed({f"{MLP}.experts.down_proj": f"{FILE}.output_linear"})
    sources += tuple((name, source._replace(stack=router.experts)) for name, source in stacked)
    return dataclasses.replace(_granite(c, PRE, 1 / c.logits_scaling, feed), sources=sources)


def _granite(c, norms, logit_scale, feed=None):
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_bias, scale=c.attention_multiplier)
    feed = GatedMLP(c.intermediate_size, c.hidden_act, c.mlp_bias) if feed is None else feed
    layer = Layer(mixer, feed, norms, scale=c.residual_multiplier)
    return decoder(c, [layer] * c.num_hidden_layers, embed_scale=c.embedding_multiplier, logit_scale=logit_scale)
