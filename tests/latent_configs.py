"""config.json of tiny models with latent attention, by name (see `family_files`)."""

from family_sizes import YARN, text, with_images

SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 36, "n_shared_experts": 2}
EXPERTS |= {"routed_scaling_factor": 1.7}
GROUPS = {"n_group": 4, "topk_group": 2}
STRETCHED = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}

CONFIGS = {
    "deepseek_v2": text("deepseek_v2", **(SIZES | {"q_lora_rank": None}), **EXPERTS, first_k_dense_replace=1, mlp_bias=True),
    "deepseek_v2_groups": text(
        "deepseek_v2", **SIZES, **EXPERTS, **GROUPS, topk_method="group_limited_greedy", rope_scaling=STRETCHED, attention_bias=True
    ),
    "deepseek_v3": text(
        "deepseek_v3",
        **SIZES,
        **EXPERTS,
        **GROUPS,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        rope_scaling=STRETCHED,
        attention_bias=True,
    ),
    "deepseek_v3_halves": text(
        "deepseek_v3",
        **(SIZES | {"q_lora_rank": None}),
        **EXPERTS,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        first_k_dense_replace=0,
        rope_interleave=False,
    ),
    "glm4_moe_lite": text("glm4_moe_lite", **SIZES, **EXPERTS, mlp_layer_types=["sparse", "dense"]),
    "mistral4": with_images(
        "mistral3",
        text(
            "mistral4",
            **SIZES,
            **EXPERTS,
            **GROUPS,
            rope_parameters=YARN | {"original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.3},
        ),
        spatial_merge_size=1,
    ),
    # Without a padding token, whose embedding transformers would set to zero as it reads the file.
    "youtu": text("youtu", **SIZES, tie_word_embeddings=True, pad_token_id=None),
}
