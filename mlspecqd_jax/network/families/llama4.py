"""Llama 4 (Meta), text: chunks of positions, layers without positions whose queries grow, experts beside a shared one."""

import math
from typing import Any

from mlspecqd_jax.network.config import Attention, Config, Experts, GatedMLP, Growth, Layer, Norm, Router
from mlspecqd_jax.network.families.common import EXPERT, PRE, attention, decoder, renamed
from mlspecqd_jax.weights.tensors import Source

OWN, FILE = "model.layers.*.mlp", "model.layers.*.feed_forward"


def llama4(c) -> Config:
    """Return the network of transformers' Llama4TextConfig, whose files hold all experts in one tensor, [E, K, N]."""
    router = Router(c.num_local_experts, c.num_experts_per_tok, "sigmoid of chosen")
    shared = GatedMLP(c.intermediate_size, c.hidden_act)
    experts = Experts(router, c.intermediate_size, c.hidden_act, weighs_input=True, shared=shared)
    dense, size = GatedMLP(c.intermediate_size_mlp, c.hidden_act), c.intermediate_size
    feeds = [experts if i in c.moe_layers else dense for i in range(c.num_hidden_layers)]
    mixers = [_mixer(c, bool(turned), kind) for turned, kind in zip(c.no_rope_layers, c.layer_types, strict=True)]
    layers = [Layer(mixer, feed, PRE) for mixer, feed in zip(mixers, feeds, strict=True)]
    names = {f"{OWN}.gate": f"{FILE}.router"} | {f"{OWN}.{name}": f"{FILE}.{name}" for name in EXPERT}
    names |= {f"{OWN}.shared_expert.{name}": f"{FILE}.shared_expert.{name}" for name in EXPERT}
    rows = zip(EXPERT, ("gate_up_proj", "gate_up_proj", "down_proj"), (0, size, 0), (size, 2 * size, c.hidden_size), strict=True)
    stacks = tuple(
        (f"{OWN}.experts.{name}.weight", Source((f"{FILE}.experts.{stored}",), router.experts, start, stop, True, router.experts))
        for name, stored, start, stop in rows
    )
    return decoder(c, layers, sources=renamed(names) + stacks)


def _mixer(c, turned: bool, kind: str) -> Attention:
    own: dict[str, Any] = {"bias": c.attention_bias, "output_bias": c.attention_bias}
    own |= {"chunk": c.attention_chunk_size if kind == "chunked_attention" else None}
    if turned:
        norm = Norm(float(c.rms_norm_eps), weight=False) if c.use_qk_norm else None
        return attention(c, interleaved=True, qk_norm=norm, qk_norm_last=True, **own)
    factors = (1 + c.attn_scale * math.log(1 + i) for i in range(c.max_position_embeddings // c.floor_scale + 1))
    growth = Growth(c.floor_scale, tuple(factors), ahead=1) if c.attn_temperature_tuning else None
    return attention(c, rope=None, growth=growth, **own)
