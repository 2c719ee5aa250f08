"""Why a model outside `FAMILIES` cannot be read: by its name, or else by a key that its config.json has."""

from collections.abc import Mapping
from typing import Any

_ALIBI = "a model that knows positions by biases of its scores (ALiBi)"
_DELTA = "a model with recurrent layers (gated delta nets)"
_MAMBA = "a model with recurrent layers (a state space)"
_INDEXED = "a model whose attention is sparse by an index"
_HYPER = "a model with hyper-connections"
_ASSISTANT = "a model that drafts from what another model computes"
NAMED = (
    dict.fromkeys(("bloom", "mpt"), _ALIBI)
    | dict.fromkeys(("olmo_hybrid",), _DELTA)
    | dict.fromkeys(("kimi_linear", "bailing_hybrid"), "a model with recurrent layers (linear attention)")
    | dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "zamba", "zamba2", "jamba"), _MAMBA)
    | dict.fromkeys(("nemotron_h", "nemotron_h_omni", "granitemoehybrid"), _MAMBA)
    | dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm", "minimax"), "a model with recurrent layers")
    | dict.fromkeys(("lfm3_vl",), "a multimodal model")
    | dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm5_next", "minimax_m3_vl", "minimax_m3_vl_text"), _INDEXED)
    | dict.fromkeys(("deepseek_v4", "qwen4_exp", "qwen4_exp_text", "hy_v4", "hy_v4_vl"), _HYPER)
    | dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _ASSISTANT)
    | dict.fromkeys(("gemma3n", "gemma3n_text"), "a model whose layers predict and correct several streams (AltUp)")
    | dict.fromkeys(("mllama",), "a model whose text attends to images across (cross-attention)")
    | dict.fromkeys(("paligemma",), "a model that attends to its whole prompt in both directions")
    | dict.fromkeys(("aya_vision", "cohere2_vision"), "a multimodal model whose logits are not scaled as its text half's")
    | dict.fromkeys(("nanochat",), "a model that rotates in the other sense")
)
BY_KEY = (
    (("kv_lora_rank",), "another model with multi-head latent attention"),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"), "a mixture of experts"),
    (("is_encoder_decoder",), "an encoder-decoder"),
    (("vision_config", "audio_config", "text_config"), "a multimodal model"),
    (("type_vocab_size",), "an encoder"),
)


def why(raw: Mapping[str, Any]) -> str:
    """Return what the model of a config.json is that cannot be read, in words that follow `is`."""
    family = raw.get("model_type")
    if isinstance(family, str) and family in NAMED:
        return NAMED[family]
    return next((kind for keys, kind in BY_KEY if any(raw.get(key) for key in keys)), "another architecture")
