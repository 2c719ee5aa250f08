"""config.json and files of models with latent attention: published sizes, what is missing, names of the file."""

import json

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import parse
from refusals import refused

from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.network.network import Network

V3, V2 = family_files.CONFIGS["deepseek_v3"], family_files.CONFIGS["deepseek_v2_groups"]
LITE = {"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944}
LITE |= {"moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "n_group": 1}
LITE |= {"topk_method": "greedy", "topk_group": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
FLASH = {"model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240}
FLASH |= {"num_hidden_layers": 47, "num_attention_heads": 20, "num_nextn_predict_layers": 1}


def described(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return describe(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "parameters", "per_token", "layers"),
    [
        (LITE, 15_706_484_224, 2_451_435_008, 27),  # 15.7 and 2.4 billion, as the paper has them
        (FLASH, 29_943_393_920, 3_579_571_840, 47),  # 30 and 3
    ],
    ids=["DeepSeek-V2-Lite", "GLM-4.7-Flash"],
)
def test_sizes_are_those_that_are_published(tmp_path, config, parameters, per_token, layers):
    found = described(tmp_path, config)
    assert (found["parameters"], found["parameters_per_token"]) == (parameters, per_token)
    assert found["cache_bytes_per_token"] == 2 * layers * (512 + 64)
    assert found["layers"].endswith("heads, latents of 512 + 64")


def test_the_hub_s_deepseek_v3(shared):
    found = describe(shared / "configs" / "deepseek-ai--DeepSeek-V3" / "config.json")
    assert found["parameters"] == 671_026_419_200
    assert found["parameters_per_token"] == 36_625_618_432  # 37 billion with the embedding
    assert found["cache_bytes_per_token"] == 2 * 61 * (512 + 64)


def test_the_scale_of_a_stretched_text(tmp_path):
    """And what is left of it where nothing is stretched."""
    mixer, plain = (parse(tmp_path, V3 | {"rope_scaling": scaling}).layers[0].mixer for scaling in (V3["rope_scaling"], None))
    assert plain.scale == 20**-0.5
    np.testing.assert_allclose(mixer.scale, 20**-0.5 * (0.13 * np.log(4) + 1) ** 2, rtol=1e-12)
    np.testing.assert_allclose(mixer.rope.magnitude, (0.07 * np.log(4) + 1) / (0.13 * np.log(4) + 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (V3 | {"qk_rope_head_dim": 7}, ("an even",)),
        (V3 | {"n_group": None}, ("no key 'n_group'", "add it")),
        (V3 | {"n_group": 3}, ("8 experts in n_group 3",)),
        (V3 | {"kv_lora_rank": 0}, ("kv_lora_rank is 0", "a whole number from 1")),
        (V3 | {"v_head_dim": None}, ("v_head_dim is None",)),
        (V2 | {"topk_method": "noaux_tc"}, ("topk_method 'noaux_tc'", "greedy, group_limited_greedy")),
        (V2 | {"num_experts_per_tok": None}, ("no key 'num_experts_per_tok'",)),
        (V2 | {"topk_group": None}, ("no key 'topk_group'",)),
        (FLASH | {"mlp_layer_types": ["dense"]}, ("mlp_layer_types is ['dense']", "each of 47 layers")),
        (FLASH | {"mlp_layer_types": ["moe"] * 47}, ("mlp_layer_types", "dense or sparse")),
        (V3 | {"model_type": "deepseek_v32"}, ("deepseek_v32", "sparse by an index")),
        (V3 | {"model_type": "longcat_flash"}, ("longcat_flash", "another model with multi-head latent attention")),
    ],
)
def test_what_is_refused(tmp_path, config, words):
    with refused(*words):
        parse(tmp_path, config)


def test_a_part_of_each_head_is_what_a_rope_turns(tmp_path):
    text = family_files.CONFIGS["mistral4"]["text_config"]
    with refused("qk_rope_head_dim is 8, but must be even and what rope_parameters rotate, 10"):
        parse(tmp_path, text | {"rope_parameters": text["rope_parameters"] | {"partial_rotary_factor": 0.5}})


def read(folder):
    return huggingface.read_params(folder, Network(config_file.read_config(folder)), jnp.dtype("float32"), None)


def test_kimi_s_files_hold_deepseek_v3(tmp_path):
    """Under a name of its own, behind what sees images; transformers writes other names than those that are published."""
    plain = read(family_files.write(tmp_path / "plain", "deepseek_v3"))
    shapes = family_files.recorded("deepseek_v3")[0]
    config = {"model_type": "kimi_k25", "text_config": V3 | {"model_type": "kimi_k2"}, "vision_config": {}}
    config |= {"tie_word_embeddings": False}
    tensors = {f"language_model.{name}": family_files.drawn(name, shape) for name, shape in shapes.items()}
    tensors |= {"vision_tower.patch_embed.pos_emb.weight": np.ones(3, np.float32)}
    tensors |= {"mm_projector.proj.0.weight": np.ones(3, np.float32)}
    folder = family_files.tiny.write_checkpoint(tmp_path / "kimi", config, tensors)
    with pytest.warns(UserWarning, match=r"left out .*mm_projector.*vision_tower"):
        jax.tree.map(np.testing.assert_array_equal, read(folder), plain)
    with refused("text_config", "model_type deepseek_v3"):
        parse(tmp_path, config | {"text_config": {"model_type": "llama"}})


def test_weights_that_are_turned_are_those_of_the_file(tmp_path):
    """Of each head [D, R] for keys, that a query is a product with, and [V, R] for values."""
    params = read(family_files.write(tmp_path, "deepseek_v3"))
    both = family_files.drawn("model.layers.0.self_attn.kv_b_proj.weight", (4 * 22, 16)).reshape(4, 22, 16)
    keys, values = (np.asarray(params[f"model.layers.0.self_attn.{x}_b_proj.weight"]) for x in "kv")
    np.testing.assert_array_equal(keys.reshape(4, 16, 12), both[:, :12].swapaxes(1, 2))
    np.testing.assert_array_equal(values.reshape(4, 10, 16), both[:, 12:])
