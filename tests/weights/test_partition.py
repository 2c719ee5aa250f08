"""Tensor parallelism over four host devices (C1): the same greedy tokens, a quarter of each split weight on each device."""

import json
import os
import pathlib
import subprocess
import sys

import family_files
import jax
import numpy as np
import pytest
import tiny
from compiling import quick_flags
from jax.sharding import Mesh, PartitionSpec

from mlspecqd_jax.network.families import config_of
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.placement import weight_sharding

pytestmark = pytest.mark.slow  # four devices, each program compiled for one and for four
ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 8, "head_dim": 6, "num_hidden_layers": 1}
CONFIGS = {
    "divides": tiny.FAMILIES["llama_bias"] | SIZES | {"num_key_value_heads": 4, "vocab_size": 100},
    "does_not": tiny.FAMILIES["qwen3"] | SIZES | {"num_key_value_heads": 2, "vocab_size": 97, "tie_word_embeddings": False},
}
# Four MX blocks along the attention's output, three along the MLP's middle, which four devices would divide by element.
TWIN = tiny.FAMILIES["qwen3"] | SIZES | {"num_key_value_heads": 4, "vocab_size": 100, "head_dim": 16, "intermediate_size": 96}

# Prints what the tests look at: one process for all of them, since the number of devices is fixed when jax starts.
SCRIPT = """
import json, sys
import jax, numpy as np
import mlspecqd_jax as mlsd

PROMPTS, NEW = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]], 24
VARIED = {"repetition_penalty": 1.5}  # keeps random models from saying one thing over and over
mesh = jax.make_mesh((4,), ("model",))
run = jax.jit(mlsd.generate_tokens, static_argnames="prefill_width")


def pieces(leaf):
    return sorted({shard.data.shape for shard in leaf.addressable_shards})


def examine(folder):
    one, four = (mlsd.load(folder, dtype="float32", mesh=m) for m in (None, mesh))
    converted = mlsd.load(mlsd.convert(folder, folder + "-converted", dtype="float32"), dtype="float32", mesh=mesh).params
    expected = mlsd.generate(mlsd.stack(one), PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **VARIED).tokens
    stack = mlsd.stack(four, exact=False)  # which is promised for no float32 weights over several devices on CPU
    batch = mlsd.prepare(stack, PROMPTS, max_new_tokens=NEW)
    sampling = mlsd.Sampling.create(len(PROMPTS), four.card.vocab_size, **VARIED)
    tokens, length, state = run(stack, batch.tokens, batch.length, batch.limit, sampling, prefill_width=16)
    return {
        "one": expected,
        "four": [tokens[r, len(PROMPTS[r]) : length[r]].tolist() for r in range(len(PROMPTS))],
        "equal": all(np.array_equal(four.params[name], leaf) for name, leaf in one.params.items()),
        "converted": all(np.array_equal(converted[name], leaf) for name, leaf in four.params.items()),
        "converted_places": all(converted[name].sharding == leaf.sharding for name, leaf in four.params.items()),
        "weights": {name: (leaf.shape, pieces(leaf)) for name, leaf in four.params.items()},
        "caches": [(leaf.shape, pieces(leaf)) for leaf in jax.tree.leaves(state.cache)],
    }


def codes(leaf):
    return leaf.arrays["codes"]


def examine_twin(folder):
    converted = mlsd.convert(folder, folder + "-converted", dtype="float32", draft="mxfp4")
    one, four = (mlsd.load(folder, dtype="float32", mesh=m).quantized() for m in (None, mesh))
    stored = mlsd.load(converted, dtype="float32", mesh=mesh).quantized()
    tokens, start = np.arange(46).reshape(2, 23), np.zeros(2, np.int32)
    one_logits, four_logits = (np.asarray(jax.jit(m.network)(m.params, tokens, start, None)[0]) for m in (one, four))
    leaves = [jax.tree.leaves(model.params) for model in (one, four, stored)]
    quantized = {name: leaf for name, leaf in four.params.items() if hasattr(leaf, "arrays")}
    return {
        "error": float(np.max(np.abs(one_logits - four_logits)) / np.max(np.abs(one_logits))),
        "equal": all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(*leaves, strict=True)),
        "stored_places": all(b.sharding == c.sharding for _, b, c in zip(*leaves, strict=True)),
        "weights": {name: [leaf.shape, pieces(codes(leaf)), pieces(leaf.arrays["scales"])] for name, leaf in quantized.items()},
    }


*folders, twin = sys.argv[1:]
found = {"devices": jax.device_count()} | {folder.rsplit("/")[-1]: examine(folder) for folder in folders}
found["twin"] = examine_twin(twin)
try:
    mlsd.load(twin, mesh=jax.make_mesh((2, 2), ("data", "heads")))
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    folders = CONFIGS | {"twin": TWIN}
    for name, config in folders.items():
        tiny.write_checkpoint(folder / name, config, tiny.weights(config, name))
    of_families = {"experts": "qwen2_moe", "shared": "gemma4", "latents": "deepseek_v3"}
    folders = {name: family_files.write(folder / name, family) for name, family in of_families.items()} | folders
    environment = os.environ | quick_flags("--xla_force_host_platform_device_count=4")
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SCRIPT, *(str(folder / name) for name in folders)]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", [*CONFIGS, "experts", "shared", "latents"])
def test_greedy_tokens_are_those_of_one_device(found, name):
    assert found["devices"] == 4
    one = found[name]["one"]
    assert [len(row) for row in one] == [24, 24]
    assert len(set(one[0])) >= 10
    assert found[name]["four"] == one


@pytest.mark.parametrize("name", [*CONFIGS, "experts", "shared", "latents"])
def test_weights_are_whole_together(found, name):
    assert found[name]["equal"]
    assert found[name]["converted"]
    assert found[name]["converted_places"]


def test_split_weights(found):
    """Along the outputs that feed heads or the MLP's middle, along the inputs that come from there."""
    weights = found["divides"]["weights"]
    for name, ((n, *k), pieces) in weights.items():
        kind = name.removesuffix(".weight").removesuffix(".bias").rsplit(".")[-1]
        if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
            expected = [n // 4, *k]
        elif kind in ("o_proj", "down_proj") and k:
            expected = [n, k[0] // 4]
        else:
            expected = [n, *k]
        assert pieces == [expected], name
    assert weights["model.layers.0.self_attn.q_proj.weight"] == [[48, 40], [[12, 40]]]


def test_experts_weights_are_split_along_what_is_contracted(found):
    """So that a device has a part of any expert's."""
    weights = found["experts"]["weights"]
    assert weights["model.layers.1.mlp.experts.up_proj.weight"] == [[5 * 36, 48], [[5 * 36, 12]]]
    assert weights["model.layers.1.mlp.experts.down_proj.weight"] == [[5 * 48, 36], [[5 * 48, 9]]]
    assert weights["model.layers.1.mlp.gate.weight"] == [[5, 48], [[5, 48]]]


def test_what_four_does_not_divide_stays_whole(found):
    weights = found["does_not"]["weights"]
    assert weights["model.embed_tokens.weight"] == [[97, 40], [[97, 40]]]
    assert weights["model.layers.0.mlp.up_proj.weight"] == [[56, 40], [[14, 40]]]


def test_caches_are_split_by_head(found):
    assert found["divides"]["caches"]
    for (batch, heads, *rest), pieces in found["divides"]["caches"]:
        assert heads == 4
        assert pieces == [[batch, 1, *rest]]
    for whole, pieces in found["does_not"]["caches"]:
        assert whole[1] == 2
        assert pieces == [whole]


def test_a_twin_on_four_devices_is_that_of_one(found):
    twin = found["twin"]
    assert twin["error"] < 1e-5
    assert twin["equal"]
    assert twin["stored_places"]


def test_elements_and_scales_are_split_alike(found):
    """By the weight's axes; along K only into whole MX blocks."""
    layer, weights = "model.layers.0", found["twin"]["weights"]
    assert len(weights) == 8
    assert weights[f"{layer}.self_attn.q_proj.weight"] == [[128, 40], [[32, 32]], [[32, 2]]]
    assert weights[f"{layer}.self_attn.o_proj.weight"] == [[40, 128], [[40, 16]], [[40, 1]]]
    assert weights[f"{layer}.mlp.gate_proj.weight"] == [[96, 40], [[24, 32]], [[24, 2]]]
    assert weights[f"{layer}.mlp.down_proj.weight"] == [[40, 96], [[40, 48]], [[40, 3]]]
    assert weights["lm_head.weight"] == [[100, 40], [[25, 64]], [[25, 2]]]  # tied, hence in mxfp8: one code a byte


def test_a_mesh_without_the_axis_is_refused(found):
    message = found["refused"]
    assert "'model'" in message
    assert "data" in message
    assert "jax.make_mesh" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("lm_head.weight", ("model", None)),
        ("model.layers.10.self_attn.v_proj.bias", ("model",)),
        ("model.layers.0.self_attn.o_proj.weight", (None, "model")),
        ("model.layers.0.self_attn.o_proj.bias", ()),
        ("model.layers.0.self_attn.q_norm.weight", ()),
        ("model.layers.0.input_layernorm.weight", ()),
    ],
)
def test_axes(name, spec):
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    tensor = Network(config_of("qwen3", num_hidden_layers=11, attention_bias=True)).tensors()[name]
    assert weight_sharding(tensor.axes, tensor.shape, mesh).spec == PartitionSpec(*spec)
