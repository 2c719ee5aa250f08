"""Tiny random checkpoints of families, in the layouts that transformers writes: fused, renamed, within a multimodal model.

`CONFIGS` maps a name to its config.json. What tensors the file has was recorded with the logits (record_reference_logits.py), by
transformers itself; their values are a function of their names alone. None of them has a default value.
"""

import functools
import json
import pathlib
import zlib
from collections.abc import Callable

import gemma4_configs
import hybrid_configs
import latent_configs
import numpy as np
import tiny
from family_sizes import IDS as _IDS
from family_sizes import VISION as _VISION
from family_sizes import VOCAB
from family_sizes import YARN as _YARN
from family_sizes import text as _text
from family_sizes import with_images as _with_images

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file

REFERENCE = pathlib.Path(__file__).parent / "reference" / "families"
TOKENS = 17

_GROWING = _YARN | {"original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.3}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 14, "out_hidden_size": 48}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3}
_SPARSE = {"num_hidden_layers": 3, "decoder_sparse_step": 2}  # every other layer
_LLAMA4 = {"head_dim": 14, "num_local_experts": 5, "intermediate_size_mlp": 40, "attention_chunk_size": 6, "floor_scale": 4}
_MROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}


def _gpt(model_type: str, **keys) -> dict:
    sizes = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return {"model_type": model_type} | sizes | _IDS | keys


CONFIGS: dict[str, dict] = {
    "llama_yarn": _text("llama", rope_parameters=_YARN, attention_bias=True),
    "gemma": _text("gemma", head_dim=14),
    "vaultgemma": _text("vaultgemma", head_dim=14, sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=4.0),
    "granite": _text(
        "granite", embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.3, attention_multiplier=0.1, mlp_bias=True
    ),
    "hyperclovax": _text(
        "hyperclovax", embedding_multiplier=3.0, logits_scaling=0.25, residual_multiplier=0.3, attention_multiplier=0.1
    ),
    "olmo": _text("olmo", clip_qkv=0.8),
    "smollm3": _text("smollm3", num_hidden_layers=3, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5),
    "phi3": _text("phi3", sliding_window=5),
    # The long factors are those of a text of any length: the model has more positions than it had at first.
    "phi3_long": _text(
        "phi3",
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]},
        partial_rotary_factor=0.5,
        tie_word_embeddings=True,
    ),
    # As many positions as at first: the short factors.
    "phi3_short": _text(
        "phi3",
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.2] * 2, "long_factor": [2.0, 3.0, 4.0] * 2},
    ),
    "glm": _text("glm", head_dim=16, attention_bias=True),
    "glm4": _text("glm4", head_dim=16, attention_bias=False),
    "cohere": _text("cohere", logit_scale=0.25, attention_bias=True),
    "cohere_norms": _text("cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": _text("cohere2", logit_scale=0.25, num_hidden_layers=3, sliding_window=5, sliding_window_pattern=2),
    "ernie4_5": _text("ernie4_5", head_dim=14, use_bias=True),
    "helium": _text("helium", head_dim=12, mlp_bias=True, attention_bias=True),
    "seed_oss": _text("seed_oss", head_dim=14, attention_out_bias=True, mlp_bias=True),
    "ministral": _text("ministral", head_dim=14, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "cwm": _text("cwm", head_dim=16, sliding_window=5, max_position_embeddings=16384, mlp_bias=True),
    "olmo2": _text("olmo2", attention_bias=True),
    "olmo3": _text(
        "olmo3", sliding_window=5, layer_types=["sliding_attention", "full_attention"], rope_theta=10000.0, rope_scaling=_YARN
    ),
    "exaone4": _text("exaone4", num_hidden_layers=3, sliding_window=5, sliding_window_pattern=2),
    "exaone4_all": _text("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
    "hunyuan": _text(
        "hunyuan_v1_dense", head_dim=14, attention_bias=True, rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0}
    ),
    "granite_swa": _text(
        "granite_swa",
        num_hidden_layers=3,
        sliding_window=5,
        layer_rope_theta=[0, 10000.0, 500.0],
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=0.3,
        attention_multiplier=0.3,
    ),
    "gpt2": _gpt("gpt2", n_inner=None),
    "gpt2_scaled": _gpt("gpt2", n_inner=56, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    "gpt_bigcode": _gpt("gpt_bigcode", n_inner=56),
    "gpt_bigcode_heads": _gpt("gpt_bigcode", n_inner=56, multi_query=False),
    "gptj": _gpt("gptj", n_inner=56, rotary_dim=8),
    "gpt_neox": _text("gpt_neox", rotary_pct=0.5, rotary_emb_base=500),
    "gpt_neox_sequential": _text("gpt_neox", use_parallel_residual=False, attention_bias=False, rotary_pct=0.34),
    "phi": _text("phi", partial_rotary_factor=0.34),
    "phi_norms": _text("phi", qk_layernorm=True),
    "falcon": _text("falcon", num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "falcon_one": _text("falcon", num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1),
    "falcon_multi": _text("falcon", multi_query=True, parallel_attn=True, bias=True),
    "falcon_heads": _text("falcon", multi_query=False, parallel_attn=False, ffn_hidden_size=56),
    "stablelm": _text("stablelm", partial_rotary_factor=0.34, use_qkv_bias=True),
    "stablelm_parallel": _text("stablelm", partial_rotary_factor=0.34, use_parallel_residual=True),
    "starcoder2": _text("starcoder2", sliding_window=5),
    "nemotron": _text("nemotron", head_dim=16, attention_bias=True, mlp_bias=True),
    "arcee": _text("arcee", head_dim=14),
    "jais2": _text("jais2"),
    "apertus": _text("apertus", attention_bias=True),
    "qwen3_moe": _text(
        "qwen3_moe", head_dim=14, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=36, **_SPARSE
    ),
    "qwen2_moe": _text(
        "qwen2_moe",
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=36,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    "mixtral": _text("mixtral", head_dim=14, num_local_experts=5, num_experts_per_tok=2, sliding_window=5),
    "minimax_m2": _text("minimax_m2", head_dim=16, rotary_dim=8, num_local_experts=5, num_experts_per_tok=2),
    "gpt_oss": _text(
        "gpt_oss",
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=5,
        rope_parameters=_YARN | {"truncate": False},
    ),
    "glm4_moe": _text(
        "glm4_moe",
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=36,
        n_shared_experts=2,
        routed_scaling_factor=1.7,
    ),
    "granitemoe": _text(
        "granitemoe", **_GRANITE, num_local_experts=5, num_experts_per_tok=2, attention_multiplier=0.1, tie_word_embeddings=True
    ),
    "granitemoeshared": _text(
        "granitemoeshared",
        **_GRANITE,
        num_local_experts=5,
        num_experts_per_tok=2,
        attention_multiplier=0.1,
        shared_intermediate_size=24,
    ),
    "olmoe": _text("olmoe", clip_qkv=0.8, num_experts=5, num_experts_per_tok=2),
    "llama4": _text("llama4_text", **_LLAMA4, num_hidden_layers=4, interleave_moe_layer_step=2, no_rope_layers=[1, 0, 1, 1]),
    "ernie4_5_moe": _text(
        "ernie4_5_moe",
        head_dim=14,
        use_bias=True,
        num_hidden_layers=3,
        moe_num_experts=5,
        moe_k=2,
        moe_intermediate_size=36,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
        moe_norm_min=0.6,
    ),
    "hunyuan_moe": _text(
        "hunyuan_v1_moe",
        head_dim=14,
        attention_bias=True,
        num_experts=5,
        moe_topk=[2, 3],
        rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    ),
    "gemma3_images": _with_images(
        "gemma3", _text("gemma3_text", head_dim=14, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "mistral3": _with_images("mistral3", _text("mistral", head_dim=14, sliding_window=None), spatial_merge_size=1),
    "ministral3": _with_images(
        "mistral3",
        _text(
            "ministral3", head_dim=14, rope_parameters=_YARN | {"original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.3}
        ),
        spatial_merge_size=1,
    ),
    "qwen2_vl": _with_images("qwen2_vl", _text("qwen2_vl_text", **_MROPE), {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    "qwen2_5_vl": _text("qwen2_5_vl", **_MROPE, tie_word_embeddings=True) | {"vision_config": _QWEN_VISION},
    "qwen3_vl": _with_images(
        "qwen3_vl",
        _text(
            "qwen3_vl_text",
            head_dim=12,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
        ),
        _QWEN_VISION | {"deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
    ),
    "llava": _with_images("llava", _text("llama"), _VISION | {"model_type": "clip_vision_model"}),
    "llava_next": _with_images("llava_next", _text("mistral"), _VISION | {"model_type": "clip_vision_model"}),
    "llava_onevision": _with_images("llava_onevision", _text("qwen2"), _VISION | {"model_type": "siglip_vision_model"}),
    "internvl": _with_images("internvl", _text("qwen3", head_dim=14), tie_word_embeddings=False),
    "smolvlm": _with_images("smolvlm", _text("llama", rms_norm_eps=1e-5)),
    "idefics3": _with_images("idefics3", _text("llama", rms_norm_eps=1e-5)),
}


def text_type(config: dict) -> str:
    """Return the model type of a checkpoint's language model."""
    kind = config["model_type"]
    return config.get("text_config", {}).get("model_type", config_file.WRAPPERS.get(kind, (kind,))[0])


CONFIGS |= gemma4_configs.CONFIGS | latent_configs.CONFIGS | hybrid_configs.CONFIGS
COMPARED = tiny.FAMILIES | CONFIGS  # config.json by name of every checkpoint whose logits are compared with transformers'


def _one_each(with_images: bool) -> dict[str, str]:
    """Return the first checkpoint of each model type, with what sees images or without."""
    return {text_type(config): name for name, config in reversed(COMPARED.items()) if ("vision_config" in config) == with_images}


# What is generated from too, plainly and with each of STACKS; of Gemma 4 also the one with experts.
GENERATED = _one_each(True) | _one_each(False) | {"gemma4": "gemma4_experts"}
STACKS: dict[str, Callable[[mlsd.Model], tuple[mlsd.Model, int]]] = {
    "its twin": lambda model: (model.quantized(), 3),  # whose products are rounded
    "itself": lambda model: (model, 3),  # all of whose drafts are accepted
}


def tokens() -> np.ndarray:
    """Return the ids of the recorded pass, int32 [1, T]."""
    return np.random.RandomState(7).randint(3, VOCAB, (1, TOKENS)).astype(np.int32)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor's random values, float32: no norm is one and no bias is zero."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("bias"):
        return (0.3 * noise).astype(np.float32)
    if name.endswith(("sinks", "A_log")):
        return noise.astype(np.float32)
    if name.endswith(("act_fn.beta", "act_fn.eps")):  # constants
        return np.full(shape, 0.5 if name.endswith("beta") else -1e-6, np.float32)
    if len(shape) < 2 or "norm" in name:
        return (1 + 0.3 * noise).astype(np.float32)
    return (1.5 * noise / np.sqrt(shape[-1])).astype(np.float32)


@functools.cache
def recorded(name: str) -> tuple[dict[str, tuple[int, ...]], np.ndarray]:
    """Return the shapes of the file's tensors by name, and the logits [T, V] of transformers."""
    with np.load(REFERENCE / f"{name}.npz") as found:
        return {key: tuple(shape) for key, shape in json.loads(str(found["tensors"])).items()}, found["logits"]


def write(folder: pathlib.Path, name: str, shapes: dict[str, tuple[int, ...]] | None = None) -> pathlib.Path:
    """Write the checkpoint of a family, with the tensors that were recorded unless others are given."""
    if name in tiny.FAMILIES:
        return tiny.write_family(folder, name)
    shapes = recorded(name)[0] if shapes is None else shapes
    return tiny.write_checkpoint(folder, CONFIGS[name], {key: drawn(key, shape) for key, shape in shapes.items()})
