"""config.json of tiny models of Gemma 4, by name (see `family_files`)."""

from family_sizes import text, with_images

GEMMA4 = {"head_dim": 14, "global_head_dim": 18, "sliding_window": 5, "final_logit_softcapping": 8.0, "tie_word_embeddings": True}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 36}
GEMMA4_VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA4_VISION |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 8}

CONFIGS = {
    # The last two layers have the keys and values of the third and the second, the embedding by layer a vocabulary of its own.
    "gemma4": text(
        "gemma4_text",
        **GEMMA4,
        num_hidden_layers=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=67,
    ),
    "gemma4_experts": with_images(
        "gemma4",
        text(
            "gemma4_text",
            **GEMMA4,
            **GEMMA4_EXPERTS,
            layer_types=["sliding_attention", "full_attention"],
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            use_bidirectional_attention="vision",
        ),
        GEMMA4_VISION,
        audio_config=None,
    ),
    "gemma4_unified": with_images(
        "gemma4_unified",
        text(
            "gemma4_unified_text",
            **GEMMA4,
            layer_types=["sliding_attention", "full_attention"],
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        ),
        {"patch_size": 4, "mm_embed_dim": 48, "mm_posemb_size": 8, "output_proj_dims": 48},
        audio_config=None,
    ),
}
