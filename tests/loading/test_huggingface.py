"""Import: which tensors are read, into which places and dtypes, and one sentence for every bad file."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from refusals import refused

from mlspecqd_jax.loading import config_file, huggingface
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.tensors import Source

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = tiny.FAMILIES["llama3"] | {"num_hidden_layers": 1}
NAME = "model.layers.0.mlp.up_proj.weight"


def read(folder, dtype="float32"):
    network = Network(config_file.read_config(folder))
    return huggingface.read_params(folder, network, jnp.dtype(dtype), None)


def write(tmp_path, change=None, config=CONFIG, **more):
    """Write the tiny model of `config` after `change` of its tensors: a value of None removes one, others are put in."""
    tensors = tiny.weights(config) | (change or {})
    return tiny.write_checkpoint(tmp_path, config, {k: v for k, v in tensors.items() if v is not None}, **more)


def equal(params, expected):
    assert set(params) == set(expected)
    for name, leaf in params.items():
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), np.asarray(expected[name], np.float64), err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_in_its_place(tmp_path, shards):
    config = tiny.FAMILIES["qwen3_bias"]
    params = read(write(tmp_path, config=config, shards=shards))
    equal(params, tiny.weights(config))
    assert list(params) == list(Network(config_file.read_config(tmp_path)).tensors())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes(tmp_path, stored):
    tensors = {name: value.astype(stored) for name, value in tiny.weights(CONFIG).items()}
    write(tmp_path, tensors)
    for dtype in ("bfloat16", "float32", "float16"):
        equal(read(tmp_path, dtype), {name: value.astype(dtype) for name, value in tensors.items()})


FUSED_IN = tiny.FAMILIES["llama_bias"]  # 6 heads over 3, of size 10; a middle of 51
QKV, HALVES = "model.layers.*.self_attn.qkv_proj", "model.layers.*.mlp.gate_up_proj"
SOURCES = {
    "model.layers.*.self_attn.q_proj": Source((QKV,), 3, 0, 20),
    "model.layers.*.self_attn.k_proj": Source((QKV,), 3, 20, 30),
    "model.layers.*.self_attn.v_proj": Source((QKV,), 3, 30, 40),
    "model.layers.*.mlp.gate_proj": Source((HALVES,), 1, 0, 51),
    "model.layers.*.mlp.up_proj": Source((HALVES,), 1, 51),
    "model.layers.*.mlp.down_proj": Source(("model.layers.*.mlp.c_proj",), transpose=True),
    "model.embed_tokens": Source(("model.wte.0", "model.wte.1")),
}


def fused():
    """Return the tensors of a file that joins queries, keys and values by the head, joins gate and up, transposes, and splits."""
    tensors = tiny.weights(FUSED_IN)
    for i in range(FUSED_IN["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            q, k, v = (tensors.pop(f"model.layers.{i}.self_attn.{x}_proj.{kind}") for x in "qkv")
            by_head = np.concatenate([part.reshape(3, -1, *part.shape[1:]) for part in (q, k, v)], axis=1)
            tensors[f"{QKV.replace('*', str(i))}.{kind}"] = by_head.reshape(-1, *q.shape[1:])
            halves = [tensors.pop(f"model.layers.{i}.mlp.{x}_proj.{kind}") for x in ("gate", "up")]
            tensors[f"{HALVES.replace('*', str(i))}.{kind}"] = np.concatenate(halves)
            tensors[f"model.layers.{i}.mlp.c_proj.{kind}"] = tensors.pop(f"model.layers.{i}.mlp.down_proj.{kind}").T
    embedding = tensors.pop("model.embed_tokens.weight")  # 97 rows do not divide, hence one more in the file
    tensors |= {"model.wte.0.weight": embedding[:49], "model.wte.1.weight": np.concatenate([embedding[49:], embedding[:1]])}
    return tensors


def read_fused(folder):
    config = config_file.read_config(folder)
    config = dataclasses.replace(config, vocab_size=98, sources=tuple(SOURCES.items()))
    return huggingface.read_params(folder, Network(config), jnp.dtype("float32"), None)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_that_fuses_tensors_is_read_by_rows(tmp_path, shards):
    """As phi3, GPT-NeoX, GPT-2 and split checkpoints lay theirs out; bit for bit, from one file or several."""
    tensors, expected = fused(), tiny.weights(FUSED_IN)
    expected["lm_head.weight"], tensors["lm_head.weight"] = (
        np.concatenate([t["lm_head.weight"]] * 2)[:98] for t in (expected, tensors)
    )
    embedding = expected["model.embed_tokens.weight"]
    expected["model.embed_tokens.weight"] = np.concatenate([embedding, embedding[:1]])
    equal(read_fused(tiny.write_checkpoint(tmp_path, FUSED_IN, tensors, shards=shards)), expected)


def test_a_fused_tensor_that_is_missing_or_of_another_shape_is_told(tmp_path):
    tensors = fused()
    tensors["lm_head.weight"] = np.ones((98, 42), np.float32)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tiny.write_checkpoint(tmp_path / "short", FUSED_IN, tensors | {name: tensors[name][1:]})
    with refused(name, "[119, 42]", "asks for [120, 42]"):
        read_fused(tmp_path / "short")
    del tensors[name]
    tiny.write_checkpoint(tmp_path / "missing", FUSED_IN, tensors)
    with refused(f"missing tensor {name}"):
        read_fused(tmp_path / "missing")


def test_a_tied_model_has_no_head_of_its_own(tmp_path):
    assert CONFIG["tie_word_embeddings"]
    embedding = tiny.weights(CONFIG)["model.embed_tokens.weight"]
    without = read(write(tmp_path / "without"))
    with_ = read(write(tmp_path / "with", {"lm_head.weight": embedding}))
    equal(with_, {name: np.asarray(leaf) for name, leaf in without.items()})
    assert "lm_head.weight" not in with_


def test_rotary_frequencies_are_ballast(tmp_path):
    ballast = np.ones(6, np.float32)
    write(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": ballast, "model.rotary_emb.inv_freq": ballast})
    equal(read(tmp_path), tiny.weights(CONFIG))


def broken_index(tmp_path, text):
    folder = write(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def cut(tmp_path, end):
    """Write a checkpoint and keep the first bytes of its file."""
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:end])
    return tmp_path


def shard_gone(tmp_path):
    (write(tmp_path, shards=2) / "model-00002-of-00002.safetensors").unlink()
    return tmp_path


def config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    return tmp_path


def with_value(value):
    tensor = tiny.weights(CONFIG)[NAME].copy()
    tensor[3, 2] = value
    return {NAME: tensor}


UNTIED = CONFIG | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write(p, {NAME: None}), (f"missing tensor {NAME}", "download")),
        (lambda p: write(p, {"lm_head.weight": None}, config=UNTIED), ("missing tensor lm_head.weight",)),
        (
            lambda p: write(p, {"model.layers.1.mlp.up_proj.weight": np.ones((2, 2), np.float32)}),
            ("unknown tensor model.layers.1.mlp",),
        ),
        (lambda p: write(p, {NAME: np.ones((48, 56), np.float32)}), (NAME, "[48, 56]", "asks for [56, 48]")),
        (lambda p: write(p, {NAME: np.ones((56, 48), np.int8)}), (NAME, "I8", "BF16")),
        (lambda p: write(p, {NAME: np.ones((56, 48), ml_dtypes.float8_e4m3fn)}), (NAME, "F8_E4M3", "BF16")),
        (lambda p: write(p, with_value(np.nan)), (NAME, "NaN", "model.safetensors")),
        (lambda p: write(p, with_value(-np.inf)), (NAME, "infinity")),
        (lambda p: cut(p, -10), ("model.safetensors", "truncated", "download it again")),
        (lambda p: cut(p, 100), ("model.safetensors", "truncated", "download it again")),
        (lambda p: cut(p, 0), ("model.safetensors", "truncated", "download it again")),
        (shard_gone, ("index.json", "model-00002-of-00002.safetensors", "not in the folder")),
        (lambda p: broken_index(p, "{"), ("index.json", "not valid JSON")),
        (lambda p: broken_index(p, "{}"), ("index.json", "weight_map")),
        (lambda p: broken_index(p, '{"weight_map": {"a": 3}}'), ("index.json", "weight_map")),
        (config_only, ("neither model.safetensors nor", "save_pretrained")),
    ],
)
def test_weights_that_cannot_be_read(tmp_path, make, words):
    folder = make(tmp_path)
    with refused(*words):
        read(folder)


def test_many_problems_are_one_sentence(tmp_path):
    write(tmp_path, {name: None for name in tiny.weights(CONFIG) if "layers.0" in name})
    with refused("missing tensor", "(and 6 more)"):
        read(tmp_path)


def test_a_value_beyond_float16(tmp_path):
    write(tmp_path, with_value(1e6))
    assert np.isfinite(read(tmp_path, "bfloat16")[NAME]).all()
    with refused(NAME, "float16", "wider dtype"):
        read(tmp_path, "float16")


def test_headers_are_checked_before_a_tensor_is_read(tmp_path, monkeypatch):
    write(tmp_path, {"model.norm.weight": None})
    monkeypatch.setattr(huggingface, "place_finite", lambda *_: pytest.fail("read a tensor of a checkpoint that is refused"))
    with refused("missing tensor model.norm.weight"):
        read(tmp_path)
