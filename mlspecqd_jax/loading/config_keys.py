"""The keys of config.json that are read: of which type each is, and in which range.

A key that a family's config class of transformers does not know is checked too, and has no effect.
"""

import math
import pathlib
from typing import Any, NamedTuple

from mlspecqd_jax.arguments import brief
from mlspecqd_jax.errors import InputError


class Rule(NamedTuple):
    """What a value may be: of one of `types`, a number from `least` to `most`, or null."""

    wanted: str
    types: tuple[type, ...]
    least: float = -math.inf
    most: float = math.inf
    null: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.null
        if type(value) not in self.types:  # a bool is no int here
            return False
        return not isinstance(value, int | float) or self.least <= value <= self.most

    def __str__(self) -> str:
        bounds = "" if self.least == -math.inf else f" from {self.least:,} to {self.most:,}"
        return f"{self.wanted}{bounds}{' or null' if self.null else ''}"


def _whole(least: int, most: int, null: bool = False) -> Rule:
    return Rule("a whole number", (int,), least, most, null)


def _number(least: float, most: float, null: bool = False) -> Rule:
    return Rule("a number", (int, float), least, most, null)


FLAG, TEXT, OBJECT, LIST = (
    Rule("true or false", (bool,)),
    Rule("text", (str,)),
    Rule("an object", (dict,), null=True),
    Rule("a list", (list,), null=True),
)
CAP = _number(1e-3, 1e6, null=True)
SCALE, SCALE_OR_NULL = _number(1e-6, 1e6), _number(1e-6, 1e6, null=True)
EXPERTS, EXPERTS_OR_NULL = _whole(1, 2**14), _whole(1, 2**14, null=True)
LATENT = _whole(1, 2**18)
POSITIONS = 2**30  # int32 holds a position and a window beyond it
KEYS: dict[str, Rule] = {
    "vocab_size": _whole(1, 2**24),
    "hidden_size": _whole(1, 2**20),
    "intermediate_size": _whole(1, 2**22),
    "num_hidden_layers": _whole(1, 1024),
    "num_attention_heads": _whole(1, 4096),
    "num_key_value_heads": _whole(1, 4096, null=True),
    "head_dim": _whole(2, 2**14, null=True),
    "max_position_embeddings": _whole(1, POSITIONS),
    "rms_norm_eps": _number(0, 1),
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": FLAG,
    "sliding_window": _whole(1, POSITIONS, null=True),
    "sliding_window_pattern": Rule("a whole number or text", (int, str), 0, 1024, null=True),
    "max_window_layers": _whole(0, POSITIONS),
    "layer_types": LIST,
    "rope_theta": _number(1, 1e15),
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "rope_local_base_freq": _number(1, 1e15),
    "partial_rotary_factor": _number(0, 1),
    "query_pre_attn_scalar": _number(1e-3, 1e6),
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "use_bidirectional_attention": Rule("true, false or text", (bool, str), null=True),
    "original_max_position_embeddings": _whole(1, POSITIONS),
    "embedding_multiplier": SCALE,
    "residual_multiplier": SCALE,
    "attention_multiplier": SCALE_OR_NULL,
    "logits_scaling": SCALE,
    "logit_scale": SCALE_OR_NULL,
    "clip_qkv": CAP,
    "n_embd": _whole(1, 2**20),
    "n_layer": _whole(1, 1024),
    "n_head": _whole(1, 4096),
    "n_inner": _whole(1, 2**22, null=True),
    "n_positions": _whole(1, POSITIONS),
    "activation_function": TEXT,
    "activation": TEXT,
    "ffn_hidden_size": _whole(1, 2**22, null=True),
    "num_kv_heads": _whole(1, 4096, null=True),
    "num_ln_in_parallel_attn": _whole(1, 2, null=True),
    "multi_query": FLAG,
    "new_decoder_architecture": FLAG,
    "parallel_attn": FLAG,
    "bias": FLAG,
    "alibi": FLAG,
    "add_cross_attention": FLAG,
    "scale_attn_weights": FLAG,
    "scale_attn_by_inverse_layer_idx": FLAG,
    "rotary_dim": _whole(2, 2**14, null=True),
    "rotary_pct": _number(0, 1),
    "rotary_emb_base": _number(1, 1e15),
    "layer_norm_epsilon": _number(0, 1),
    "norm_epsilon": _number(0, 1),
    "norm_eps": _number(0, 1),
    "use_parallel_residual": FLAG,
    "use_qkv_bias": FLAG,
    "qk_layernorm": FLAG,
    "layer_norm_eps": _number(0, 1),
    "use_bias": FLAG,
    "attention_out_bias": FLAG,
    "use_post_norm": FLAG,
    "use_qk_norm": FLAG,
    "no_rope_layers": LIST,
    "layer_rope_theta": LIST,
    "no_rope_layer_interval": _whole(1, 1024),
    "num_experts": EXPERTS_OR_NULL,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS_OR_NULL,
    "n_group": EXPERTS_OR_NULL,
    "topk_group": EXPERTS_OR_NULL,
    "n_shared_experts": EXPERTS,
    "moe_intermediate_size": _whole(1, 2**22, null=True),
    "shared_expert_intermediate_size": _whole(1, 2**22),
    "shared_intermediate_size": _whole(0, 2**22),
    "decoder_sparse_step": _whole(1, 1024),
    "mlp_only_layers": LIST,
    "first_k_dense_replace": _whole(0, 1024),
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": SCALE,
    "qkv_bias": FLAG,
    "moe_num_experts": EXPERTS,
    "moe_k": EXPERTS,
    "moe_topk": Rule("a whole number or a list", (int, list), 1, 2**14),
    "moe_num_shared_experts": _whole(0, 2**14),
    "moe_layer_start_index": _whole(0, 1024),
    "moe_layer_end_index": _whole(-1, 1024),
    "moe_layer_interval": _whole(1, 1024),
    "moe_norm_min": _number(0, 1),
    "intermediate_size_mlp": _whole(1, 2**22),
    "moe_layers": LIST,
    "interleave_moe_layer_step": _whole(1, 1024),
    "attention_chunk_size": _whole(1, POSITIONS, null=True),
    "attn_temperature_tuning": FLAG,
    "floor_scale": _whole(1, POSITIONS),
    "attn_scale": _number(0, 1e3),
    "swiglu_alpha": SCALE,
    "swiglu_limit": SCALE,
    "linear_conv_kernel_dim": _whole(1, 1024),
    "linear_key_head_dim": _whole(1, 2**14),
    "linear_value_head_dim": _whole(1, 2**14),
    "linear_num_key_heads": _whole(1, 4096),
    "linear_num_value_heads": _whole(1, 4096),
    "full_attention_interval": _whole(1, 1024),
    "conv_L_cache": _whole(1, 1024),
    "conv_bias": FLAG,
    "block_multiple_of": _whole(1, 2**20),
    "block_ffn_dim_multiplier": SCALE_OR_NULL,
    "block_auto_adjust_ff_dim": FLAG,
    "full_attn_idxs": LIST,
    "use_sandwich_norm": FLAG,
    "use_attention_gate": FLAG,
    "num_dense_layers": _whole(0, 1024),
    "use_expert_bias": FLAG,
    "global_head_dim": _whole(2, 2**14),
    "num_global_key_value_heads": _whole(1, 4096, null=True),
    "per_layer_config": OBJECT,
    "attention_k_eq_v": FLAG,
    "num_kv_shared_layers": _whole(0, 1024),
    "enable_moe_block": FLAG,
    "top_k_experts": EXPERTS_OR_NULL,
    "use_double_wide_mlp": FLAG,
    "kv_lora_rank": LATENT,
    "q_lora_rank": _whole(1, 2**18, null=True),
    "qk_nope_head_dim": LATENT,
    "qk_rope_head_dim": LATENT,
    "v_head_dim": LATENT,
    "topk_method": TEXT,
    "rope_interleave": FLAG,
    "mlp_layer_types": LIST,
    "hidden_size_per_layer_input": _whole(0, 2**20),
    "vocab_size_per_layer_input": _whole(1, 2**24),
}
ROPE_KEYS: dict[str, Rule] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": KEYS["rope_theta"],
    "partial_rotary_factor": KEYS["partial_rotary_factor"],
    "factor": _number(1e-3, 1e6),
    "low_freq_factor": _number(1e-3, 1e6),
    "high_freq_factor": _number(1e-3, 1e6),
    "original_max_position_embeddings": _whole(2, POSITIONS),
    "beta_fast": _number(1e-3, 1e6, null=True),
    "beta_slow": _number(1e-3, 1e6, null=True),
    "mscale": _number(0, 1e3, null=True),
    "mscale_all_dim": _number(0, 1e3, null=True),
    "attention_factor": _number(1e-3, 1e3, null=True),
    "truncate": FLAG,
    "short_factor": LIST,
    "long_factor": LIST,
    "alpha": _number(1e-3, 1e9, null=True),
    "llama_4_scaling_beta": _number(0, 1e3, null=True),
    "max_position_embeddings": _whole(1, POSITIONS),  # of no effect here
    "mrope_section": LIST,  # of no effect on a text
    "mrope_interleaved": FLAG,
}


def check_table(path: pathlib.Path, values: dict, rules: dict[str, Rule], within: str = "") -> None:
    """Raise an InputError that names the first key of `values` that its rule does not allow."""
    for key, rule in rules.items():
        if key in values and not rule.allows(values[key]):
            raise InputError(f"{path}: {within}{key} is {brief(values[key])}, but must be {rule}; correct that key")


def check_numbers(path: pathlib.Path, name: str, values: Any, count: int, least: float = 1e-3) -> None:
    """Raise an InputError unless a key is a list of so many numbers from `least` on."""
    rule = _number(least, 1e6)
    if not isinstance(values, list) or len(values) != count or not all(rule.allows(value) for value in values):
        raise InputError(f"{path}: {name} is {brief(values)}, but must be {count} numbers from {least:,}; correct that key")
