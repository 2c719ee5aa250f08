"""Gemma 4 (Google): heads of two sizes, normed values, layers that read earlier ones' keys and values, an embedding by layer."""

import dataclasses
from typing import Any

from mlspecqd_jax.network.config import Attention, Config, Experts, GatedMLP, Layer, Norm, OwnInput, Router
from mlspecqd_jax.network.families.common import EXPERT, SANDWICH, Sources, attention, decoder, renamed, stacked_experts, windows
from mlspecqd_jax.weights.tensors import Source

LAYER = "model.layers.*"
MLP = f"{LAYER}.mlp"
OWN = {
    "model.own_inputs.embed_tokens": "model.embed_tokens_per_layer",
    "model.own_inputs.projection": "model.per_layer_model_projection",
    "model.own_inputs.norm": "model.per_layer_projection_norm",
    f"{LAYER}.own.gate_proj": f"{LAYER}.per_layer_input_gate",
    f"{LAYER}.own.down_proj": f"{LAYER}.per_layer_projection",
    f"{LAYER}.own.norm": f"{LAYER}.post_per_layer_input_norm",
}
BESIDE = {  # where a layer has experts
    f"{MLP}.gate": f"{LAYER}.router.proj",
    f"{MLP}.norm": f"{LAYER}.pre_feedforward_layernorm_2",
    f"{MLP}.after_norm": f"{LAYER}.post_feedforward_layernorm_2",
    f"{MLP}.shared_norm": f"{LAYER}.pre_feedforward_layernorm",
    f"{MLP}.after_shared_norm": f"{LAYER}.post_feedforward_layernorm_1",
} | {f"{MLP}.shared_expert.{name}": f"{MLP}.{name}" for name in EXPERT}


def gemma4(c) -> Config:
    """Return the network of transformers' Gemma4TextConfig or Gemma4UnifiedTextConfig; the latter knows no experts."""
    norm, experts = Norm(float(c.rms_norm_eps)), getattr(c, "enable_moe_block", False)
    keeping, size = c.num_hidden_layers - c.num_kv_shared_layers, getattr(c, "hidden_size_per_layer_input", 0)
    own = OwnInput(c.vocab_size_per_layer_input, size, c.num_hidden_layers, c.hidden_activation) if size else None
    norms = (*SANDWICH[:2], None, SANDWICH[3]) if experts else SANDWICH
    layers = []
    for i, window in enumerate(windows(c)):
        source = None if i < keeping else max(j for j in range(keeping) if c.layer_types[j] == c.layer_types[i])
        wide = 2 if c.use_double_wide_mlp and source is not None else 1
        feed = GatedMLP(wide * c.intermediate_size, c.hidden_activation)
        mixer = _mixer(c, i, norm, window=window, kept_by=source)
        layers.append(Layer(mixer, _beside(c, norm, feed) if experts else feed, norms, own=own, scalar=True))
    sources = (renamed(OWN) if own else ()) + (_experts(c) if experts else ())
    caps = {"embed_scale": c.hidden_size**0.5, "logit_cap": c.final_logit_softcapping}
    return decoder(c, layers, norm=norm, sources=sources, **caps)


def _mixer(c, i: int, norm: Norm, **more) -> Attention:
    kind, bias, of_values = c.layer_types[i], c.attention_bias, dataclasses.replace(norm, weight=False)
    own: dict[str, Any] = {"bias": bias, "output_bias": bias, "scale": 1.0, "qk_norm": norm, "value_norm": of_values}
    of_keys = c.attention_k_eq_v and kind == "full_attention"
    return attention(c.per_layer_config[i], c.rope_parameters[kind], values_of_keys=of_keys, **own, **more)


def _beside(c, norm: Norm, dense: GatedMLP) -> Experts:
    """Experts beside the dense MLP, each between norms of its own."""
    scores: dict[str, Any] = {"scores": "softmax", "input_norm": norm, "scale": c.hidden_size**-0.5}
    router = Router(c.num_experts, c.top_k_experts, normed=True, expert_factors=True, **scores)
    return Experts(router, c.moe_intermediate_size, c.hidden_activation, shared=dense, norms=norm)


def _experts(c) -> Sources:
    scales = {f"{MLP}.gate.norm.weight": "scale", f"{MLP}.gate.expert_factors": "per_expert_scale"}
    stacked = stacked_experts(c.num_experts, c.moe_intermediate_size, f"{LAYER}.experts")
    return renamed(BESIDE) + stacked + tuple((own, Source((f"{LAYER}.router.{name}",))) for own, name in scales.items())
