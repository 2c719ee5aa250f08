"""Gemma 4's config.json and files: sizes by layer in each spelling, what its models are published to have, what is left out."""

import json

import family_files
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_folders
from configs import parse
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.stacks import is_twin
from mlspecqd_jax.weights.quantized_array import QuantizedArray

TABLE = "model.own_inputs.embed_tokens.weight"
TINY, EXPERTS = family_files.CONFIGS["gemma4"], family_files.CONFIGS["gemma4_experts"]["text_config"]
# As Google's own code has them (google-deepmind/gemma, gemma4/_gemma4.py), under transformers' names.
E2B = {"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "num_key_value_heads": 1}
E2B |= {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
E2B["layer_types"] = [*["sliding_attention"] * 4, "full_attention"] * 7
E4B = {"hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "num_key_value_heads": 2}
E4B |= {"num_kv_shared_layers": 18}
DENSE = {"hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504, "num_attention_heads": 32}
DENSE |= {"num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}


@pytest.mark.parametrize(
    ("config", "parameters", "per_token", "cache"),
    [
        # Of 5.1 and 8.0 billion with what sees and hears, and 2.3 and 4.5 effective ones, as their pages round them.
        (E2B, 4_628_569_379, 2_279_759_139, 2 * 2 * (12 * 256 + 3 * 512)),
        (E4B, 7_463_013_418, 4_644_441_130, 2 * 2 * 2 * (20 * 256 + 4 * 512)),
        (DENSE, 30_697_345_340, None, 2 * 2 * (50 * 16 * 256 + 10 * 4 * 512)),
    ],
    ids=["E2B", "E4B", "31B"],
)
def test_sizes_are_those_that_are_published(tmp_path, config, parameters, per_token, cache):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma4", "text_config": config, "audio_config": None}))
    found = describe(path)
    assert (found["parameters"], found.get("parameters_per_token")) == (parameters, per_token)
    assert found["cache_bytes_per_token"] == cache
    if per_token is None:
        assert "embedding_by_layer" not in found
        assert found["layers"].endswith("16 or 4 key/value heads")
        return
    row = 256 * config["num_hidden_layers"]
    assert found["parameters"] - per_token == 262_144 * row
    assert found["embedding_by_layer"] == f"{262_144 * row:,} of the parameters, of which a token reads {row:,}"
    assert found["layers"].endswith(f"{config['num_kv_shared_layers']} with those of earlier layers")
    assert all(twin["bytes"] < 2 * per_token for twin in found["twins"].values())  # no twin has a table of its own


def test_the_hub_s_26b_a4b(shared):
    found = describe(shared / "configs" / "google--gemma-4-26B-A4B" / "config.json")
    assert (found["parameters"], found["parameters_per_token"]) == (25_233_141_790, 3_822_530_590)
    assert found["cache_bytes_per_token"] == 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)


def test_both_spellings_of_sizes_by_layer(tmp_path):
    """The hub's files have global_head_dim, those that transformers writes per_layer_config."""
    plain = {key: value for key, value in EXPERTS.items() if not key.startswith(("global", "num_global"))}
    found = parse(tmp_path, plain | {"per_layer_config": {"01": {"head_dim": 18, "num_key_value_heads": 1}}})
    assert found == parse(tmp_path, EXPERTS)
    mixers = [layer.mixer for layer in found.layers]
    assert [(m.head_dim, m.kv_heads, m.values_of_keys, m.window) for m in mixers] == [(14, 2, False, 5), (18, 1, True, None)]
    assert all(m.scale == 1 for m in mixers)
    assert [f > 0 for f in mixers[1].rope.frequencies] == [True] * 2 + [False] * 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_bidirectional_attention": "all"}, ("use_bidirectional_attention", "only causal attention")),
        ({"num_kv_shared_layers": 4}, ("num_kv_shared_layers is 4 of 5 layers", "full_attention")),
        ({"num_kv_shared_layers": 5}, ("no layer before those",)),
        ({"num_kv_shared_layers": 9}, ("no layer before those",)),
        ({"enable_moe_block": True}, ("'num_experts'", "add it")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, ("rope_parameters: sliding",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {}}}, ("sliding_attention: rope_theta",)),
        ({"vocab_size_per_layer_input": 60}, ("vocab_size_per_layer_input is 60", "at least vocab_size 61")),
        ({"global_head_dim": 17}, ("head_dim is 17", "an even one")),
        ({"per_layer_config": {"1": {"head_dim": 18, "sliding_window": 4}}}, ("per_layer_config has '1'", "head_dim and")),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, ("per_layer_config: 1: head_dim is 0",)),
        ({"per_layer_config": {"1": {"head_dim": 18}}}, ("differs between layers of one type",)),
        ({"per_layer_config": {"9": {"head_dim": 18}}}, ("refused by transformers",)),
    ],
)
def test_what_is_refused(tmp_path, change, words):
    with refused(*words):
        parse(tmp_path, TINY | change)


def test_a_rope_of_a_part_of_each_head_is_proportional(tmp_path):
    ropes = {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    ropes |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with refused("partial_rotary_factor 0.5 is not supported"):
        parse(tmp_path, TINY | {"rope_parameters": ropes})


def read(folder):
    return huggingface.read_params(folder, Network(config_file.read_config(folder)), jnp.dtype("float32"), None)


def test_keys_and_values_that_no_layer_reads_are_left_out(tmp_path):
    """Files may hold some for layers that have an earlier one's."""
    more = {"k_proj.weight": (28, 48), "v_proj.weight": (28, 48), "k_norm.weight": (14,)}
    shapes = family_files.recorded("gemma4")[0]
    assert not any(name.startswith("model.layers.3.self_attn.k") for name in shapes)
    more = {f"model.layers.3.self_attn.{name}": shape for name, shape in more.items()}
    with pytest.warns(UserWarning, match=r"left out what this model does not use: model\.layers\.3\.self_attn\.k_norm"):
        params = read(family_files.write(tmp_path, "gemma4", shapes | more))
    plain = read(family_files.write(tmp_path / "plain", "gemma4"))
    assert params.keys() == plain.keys()
    assert all(np.array_equal(params[name], leaf) for name, leaf in plain.items())


@pytest.mark.filterwarnings("ignore")  # of what sees images
def test_values_beside_keys_that_are_values_are_refused(tmp_path):
    name = "model.language_model.layers.1.self_attn.v_proj.weight"
    with refused(f"unknown tensor {name}"):
        read(family_files.write(tmp_path, "gemma4_experts", family_files.recorded("gemma4_experts")[0] | {name: (18, 48)}))


def test_a_twin_casts_each_layer_s_own_part_and_shares_the_table(tmp_path):
    model = mlsd.load(family_files.write(tmp_path, "gemma4"))
    twin = model.quantized()
    cast = {name for name, leaf in twin.params.items() if leaf is not model.params.get(name)}
    assert cast == {name for name, tensor in model.network.tensors().items() if tensor.linear} | {"lm_head.weight"}
    assert {"model.own_inputs.projection.weight", "model.layers.4.own.down_proj.weight"} <= cast
    assert twin.params[TABLE] is model.params[TABLE]
    assert model.nbytes - model.bytes_read() == model.params[TABLE].nbytes
    found = describe(tmp_path)
    assert found["parameters_per_token"] == model.bytes_read() // 2


@pytest.mark.slow
def test_a_dense_one_that_others_quantized_is_its_twin(tmp_path):
    """Whose layers have no values of their own, and heads of two sizes."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "global_head_dim": 32, "tie_word_embeddings": False}
    config = family_files.CONFIGS["gemma4_unified"]["text_config"] | sizes
    tensors = Network(config_file.config_of(tmp_path / "config.json", config)).tensors()
    plain = {name: family_files.drawn(name, t.shape).astype(np.float16).astype(np.float32) for name, t in tensors.items()}
    target = mlsd.load(quantized_folders.write_plain(tmp_path / "plain", plain, config), dtype="float32")
    quantization, _ = quantized_folders.LAYOUTS["nvfp4"]
    folder = quantized_folders.write(tmp_path / "quantized", quantized_folders.quantized("nvfp4", plain)[0], quantization, config)
    twin = mlsd.load(folder, twin_of=target)
    assert is_twin(twin, target)
    assert all(isinstance(twin.params[name], QuantizedArray) == name.endswith("_proj.weight") for name in plain)
