"""config.json of tiny models in which other layers stand for most attention, by name (see `family_files`)."""

from family_sizes import VISION, text, with_images

QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 14, "out_hidden_size": 48}
DELTA = {"num_hidden_layers": 3, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 10}
DELTA |= {"linear_value_head_dim": 12, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
TWO = DELTA | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
CHOSEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 24}
THREE = {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]}

CONFIGS = {
    "qwen3_next": text("qwen3_next", **TWO, **CHOSEN, partial_rotary_factor=0.4, attention_bias=True, mlp_only_layers=[1]),
    "qwen3_5": text(
        "qwen3_5_text", **DELTA | {"linear_conv_kernel_dim": 3, "linear_num_value_heads": 2}, partial_rotary_factor=0.4
    ),
    "qwen3_5_moe": text("qwen3_5_moe_text", **TWO, **CHOSEN),
    "lfm2": text("lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_bias=True, block_multiple_of=20),
    "lfm2_wide": text("lfm2", full_attn_idxs=[1], conv_L_cache=5, block_auto_adjust_ff_dim=False, tie_word_embeddings=False),
    "lfm3": text("lfm3", **THREE, head_dim=12, sliding_window=5, conv_bias=True, conv_L_cache=4),
    "lfm3_plain": text("lfm3", **THREE, head_dim=12, use_sandwich_norm=False, use_attention_gate=False, attention_bias=True),
    "lfm2_moe": text(
        "lfm2_moe",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        num_dense_layers=1,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=36,
        routed_scaling_factor=1.7,
    ),
    "qwen3_5_images": with_images(
        "qwen3_5",
        text(
            "qwen3_5_text",
            **DELTA,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.4,
                "mrope_section": [1, 1, 1],
                "mrope_interleaved": True,
            },
        ),
        QWEN_VISION,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe_images": with_images("qwen3_5_moe", text("qwen3_5_moe_text", **TWO, **CHOSEN), QWEN_VISION),
    "lfm2_vl": with_images("lfm2_vl", text("lfm2", full_attn_idxs=[1]), VISION | {"num_patches": 4}),
}
