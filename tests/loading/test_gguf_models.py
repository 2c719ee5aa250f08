"""GGUF files of every architecture: the network and the weights of the checkpoint that they were made of, or a refusal."""

import dataclasses
import json
import warnings

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gguf_files import floats, keys_of
from refusals import refused

import mlspecqd_jax as mlsd
from mlspecqd_jax.loading import config_file, models
from mlspecqd_jax.loading.description import describe
from mlspecqd_jax.loading.gguf import architectures, reader, weights
from mlspecqd_jax.network.network import Network

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LLAMA = {key: value for key, value in tiny.FAMILIES["llama3"].items() if key != "rope_scaling"} | {"hidden_size": 96}
CONFIGS = {name: tiny.FAMILIES[name] for name in ("llama2", "llama_linear", "mistral", "qwen2", "qwen3", "gemma3")}
CONFIGS |= {
    "llama_tied": LLAMA,
    "llama_bias": tiny.FAMILIES["llama_bias"] | {"hidden_act": "silu"},
    "qwen3_bias": tiny.FAMILIES["qwen3_bias"] | {"use_sliding_window": False},
    "gemma2": tiny.FAMILIES["gemma2"] | {"query_pre_attn_scalar": 14},
}


def load(path, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return mlsd.load(path, **more)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_what_its_folder_is(tmp_path, name):
    config = CONFIGS[name]
    folder = tiny.write_checkpoint(tmp_path / name, config, tiny.weights(config))
    file = gguf_files.model(tmp_path / "x.gguf", config, kind="BF16")
    original, found = load(folder), load(file)
    assert found.network == original.network
    assert found.network.config.layers == original.network.config.layers  # of which a hash tells only the first
    assert found.params.keys() == original.params.keys()
    for key, leaf in original.params.items():
        assert found.params[key].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.params[key], leaf, err_msg=key)


def test_logits_are_those_of_the_original(tmp_path):
    config = tiny.FAMILIES["llama2"]
    folder = tiny.write_checkpoint(tmp_path / "folder", config, tiny.weights(config))
    file = gguf_files.model(tmp_path / "x.gguf", config)
    original, found = load(folder, dtype="float32"), load(file, dtype="float32")
    tokens, start = jnp.asarray(tiny.tokens()), jnp.zeros(tiny.TOKENS[0], jnp.int32)
    run = jax.jit(lambda network, params: network(params, tokens, start, None)[0], static_argnums=0)
    logits = np.asarray(run(original.network, original.params))
    np.testing.assert_array_equal(run(found.network, found.params), logits)
    assert np.abs(logits).max() > 1
    swapped = found.params | {name: leaf[::-1] for name, leaf in found.params.items() if "q_proj" in name}
    assert np.abs(run(found.network, swapped) - logits).max() > 1e-3


def test_numbers_are_the_shortest_decimals(tmp_path):
    file = gguf_files.model(tmp_path / "x.gguf", LLAMA | {"rope_theta": 1234.5, "rms_norm_eps": 1e-6})
    found = architectures.config_json(reader.read(file))
    assert (found["rms_norm_eps"], found["rope_theta"]) == (1e-6, 1234.5)


def divisors(scaling, base, dim):
    """Llama 3.1's rule, as llama.cpp's converter computes it."""
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * base ** (i / dim)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        smooth = (low / wavelength - 1) * scaling["low_freq_factor"] / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        kept = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        factors.append(1 if wavelength < high else scaling["factor"] if wavelength > low else kept)
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("factor", "positions", "base", "dim"),
    [(8.0, 8192, 500000.0, 128), (32.0, 8192, 500000.0, 64), (8.0, 80, 10000.0, 12), (4.0, 5000, 10000.0, 64)],
)
def test_divisors_of_frequencies_are_llama3s(tmp_path, factor, positions, base, dim):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": positions}
    config = LLAMA | {"rope_theta": base, "head_dim": dim}
    file = gguf_files.model(tmp_path / "x.gguf", config, **{"rope_freqs.weight": floats(divisors(scaling, base, dim))})
    found = architectures.config_json(reader.read(file))
    assert found["rope_scaling"] == scaling
    plain = config_file.config_of(file, found | {"rope_scaling": None}).layers[0].mixer.rope.frequencies
    scaled = config_file.config_of(file, found).layers[0].mixer.rope.frequencies
    np.testing.assert_allclose(np.array(plain) / scaled, divisors(scaling, base, dim), rtol=1e-6)
    assert mlsd.load(file).network.config.layers[0].mixer.rope.frequencies == scaled


def test_divisors_of_one_change_nothing(tmp_path):
    file = gguf_files.model(tmp_path / "x.gguf", LLAMA, **{"rope_freqs.weight": floats(np.ones(6, np.float32))})
    assert "rope_scaling" not in architectures.config_json(reader.read(file))


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_keys_of_scaling(tmp_path, keys, scaling):
    file = gguf_files.model(tmp_path / "x.gguf", LLAMA, {f"llama.{key}": value for key, value in keys.items()})
    assert architectures.config_json(reader.read(file)).get("rope_scaling") == scaling


KEYS = [
    ({"general.architecture": "mamba"}, ["'mamba'", "not supported", "qwen3"]),
    ({"general.architecture": 7}, ["7", "not supported"]),
    ({"llama.attention.head_count_kv": [2, 2, 1]}, ["llama.attention.head_count_kv", "[2, 2, 1]", "for all layers"]),
    ({"llama.feed_forward_length": [56, 56, 56]}, ["llama.feed_forward_length", "for all layers"]),
    ({"llama.block_count": 2**31}, ["llama.block_count", "1,024"]),
    ({"llama.attention.value_length": 10}, ["llama.attention.value_length", "10", "12"]),
    ({"llama.rope.dimension_count": 6}, ["llama.rope.dimension_count", "6", "12"]),
    ({"llama.expert_count": 8}, ["llama.expert_count", "8", "only 0"]),
    ({"llama.attention.causal": False}, ["llama.attention.causal", "only True"]),
    ({"llama.attention.sliding_window": 7, "llama.attention.sliding_window_pattern": 2}, ["sliding_window_pattern'", "not known"]),
    ({"llama.logit_scale": 0.5}, ["'llama.logit_scale'", "not known"]),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ["'yarn'", "not supported", "linear"]),
    (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 8},
        ["'yarn'"],
    ),
    ({"llama.rope.scaling.type": 3, "llama.rope.scaling.factor": 4.0}, ["rope_type", "3"]),
    ({"llama.attention.head_count_kv": 5}, ["num_attention_heads 6", "multiple"]),
]


@pytest.mark.parametrize(("keys", "words"), KEYS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_keys_that_are_not_read(tmp_path, keys, words):
    file = gguf_files.model(tmp_path / "x.gguf", LLAMA, keys)
    for function in (mlsd.load, describe):
        with refused("x.gguf", *words):
            function(file)


def test_a_key_that_is_missing(tmp_path):
    for absent in ("llama.embedding_length", "llama.attention.layer_norm_rms_epsilon"):
        keys = {key: value for key, value in keys_of(LLAMA).items() if key != absent}
        with refused("no key", absent):
            mlsd.load(gguf_files.write(tmp_path / "x.gguf", keys, gguf_files.tensors_of(LLAMA, tiny.weights(LLAMA))))


def test_tensors_that_are_not_the_models(tmp_path):
    ones = floats(np.ones((4, 4), np.float32))
    for name in ("blk.0.attn_qkv.weight", "blk.1.ffn_gate_up.weight", "blk.0.attn_q_norm.weight", "v.patch_embd.weight", "x"):
        with refused("x.gguf", f"unknown tensor {name}"):
            mlsd.load(gguf_files.model(tmp_path / "x.gguf", LLAMA, **{name: ones}))
    tensors = gguf_files.tensors_of(LLAMA, tiny.weights(LLAMA))
    for name in ("blk.2.attn_norm.weight", "output_norm.weight", "token_embd.weight"):
        rest = {key: value for key, value in tensors.items() if key != name}
        with refused("x.gguf", "no tensor" if "embd" in name else "missing tensor", name):
            mlsd.load(gguf_files.write(tmp_path / "x.gguf", keys_of(LLAMA), rest))
    with refused("tensor blk.0.ffn_up.weight", "[4, 4]", "[56, 96]"):
        mlsd.load(gguf_files.model(tmp_path / "x.gguf", LLAMA, **{"blk.0.ffn_up.weight": ones}))
    with refused("rope_freqs.weight", "[4, 4]"):
        mlsd.load(gguf_files.model(tmp_path / "x.gguf", LLAMA, **{"rope_freqs.weight": ones}))
    for strange in (np.arange(1, 7), np.full(6, np.nan), np.zeros(6), -np.ones(6), np.full(6, np.inf), [1, 1, 1, 1, 1, 0.5]):
        with refused("rope_freqs.weight", "not Llama 3.1's"):
            mlsd.load(gguf_files.model(tmp_path / "x.gguf", LLAMA, **{"rope_freqs.weight": floats(np.array(strange))}))
    with refused("token_embd.weight", "NaN"):
        mlsd.load(gguf_files.model(tmp_path / "x.gguf", LLAMA, **{"token_embd.weight": floats(np.full((97, 96), np.nan))}))


def quantized(path, kind="Q8_0"):
    """Write a llama whose matrices of whole blocks are random ones."""
    tensors = gguf_files.tensors_of(LLAMA, tiny.weights(LLAMA))
    random = np.random.default_rng(0)
    for name, (_, _, shape) in tensors.items():
        if len(shape) == 2 and shape[1] % 32 == 0:
            raw = random.integers(0, 256, (shape[0], shape[1] // 32, 34), np.uint8)
            raw[..., 1] = 0x20 | raw[..., 1] & 0x83  # scales of about 1 / 100
            tensors[name] = (kind, raw.reshape(-1), shape)
    return gguf_files.write(path, keys_of(LLAMA), tensors)


def test_what_was_dequantized_is_told(tmp_path):
    path = quantized(tmp_path / "x.gguf")
    with pytest.warns(UserWarning, match=r"x.gguf: .*\(16 of Q8_0 and 13 of floats\); the rounding to bfloat16 is ours") as told:
        model = mlsd.load(path)
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"dequantized \(16 of Q8_0 and 13 of floats\)$"):
        exact = mlsd.load(path, dtype="float32")
    for name, leaf in exact.params.items():
        np.testing.assert_array_equal(model.params[name], np.asarray(leaf).astype(jnp.bfloat16))
    assert describe(path)["tensors"] == "16 Q8_0, 13 F32"


def test_packed_rows_are_in_hugging_faces_order(tmp_path):
    file = reader.read(quantized(tmp_path / "x.gguf"))
    network = Network(config_file.config_of(file.path, architectures.config_json(file)))
    stored = weights.locate(file, network)
    assert weights.packed(stored["model.norm.weight"]) is None
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"):
        format, arrays = weights.packed(stored[name])
        assert format == "int8_g32"
        found = (arrays["codes"].astype(np.float32) - 128) * np.repeat(arrays["scales"].astype(np.float32), 32, 1)
        np.testing.assert_array_equal(found, weights.values(stored[name], np.float32), err_msg=name)


def test_convert_keeps_the_model_without_its_file(tmp_path):
    path = quantized(tmp_path / "x.gguf")
    with pytest.warns(UserWarning, match="dequantized"):
        original = mlsd.load(path)
    with pytest.warns(UserWarning, match="dequantized"):
        models.convert(path, tmp_path / "out")
    path.unlink()
    found = load(tmp_path / "out")
    assert found.network == original.network
    for name, leaf in original.params.items():
        np.testing.assert_array_equal(found.params[name], leaf, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert dataclasses.replace(found.card, name="") == dataclasses.replace(original.card, name="")


@pytest.mark.parametrize(
    ("keys", "local"),
    [
        ({"gemma3.attention.sliding_window_pattern": [True, False, False, True]}, [True, False, False, True]),
        ({"gemma3.attention.sliding_window_pattern": 4}, [True, True, True, False]),
        ({"gemma3.attention.sliding_window": 0}, [False] * 4),
    ],
)
def test_which_layers_of_gemma_have_a_window(tmp_path, keys, local):
    found = mlsd.load(gguf_files.model(tmp_path / "x.gguf", CONFIGS["gemma3"], keys)).network.config
    assert [layer.mixer.window is not None for layer in found.layers] == local
    for bad in (0, "x", [True], 1.5):
        with refused("sliding_window_pattern", "4 layers"):
            mlsd.load(gguf_files.model(tmp_path / "x.gguf", CONFIGS["gemma3"], {"gemma3.attention.sliding_window_pattern": bad}))


def test_gemmas_largest_size_scales_scores_by_the_width(tmp_path):
    config = CONFIGS["gemma2"]
    for layers, scalar in ((4, 14), (46, 10)):
        keys = keys_of(config) | {"gemma2.block_count": layers}
        path = gguf_files.write(tmp_path / "x.gguf", keys, gguf_files.tensors_of(config, tiny.weights(config)))
        found = architectures.config_json(reader.read(path))
        assert found["query_pre_attn_scalar"] == scalar
        assert found["layer_types"][:2] == ["sliding_attention", "full_attention"]
        assert len(found["layer_types"]) == layers
