"""Import: what a config.json means, which tensors are read, what is fetched from a hub, and one sentence for every bad input."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from mlspecqd_jax import config_file, huggingface, models
from mlspecqd_jax.rope import RopeScaling
from mlspecqd_jax.transformer import LanguageModel

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = tiny.FAMILIES["llama3"] | {"num_hidden_layers": 1}
NAME = "model.layers.0.mlp.up_proj.weight"


def parse(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return config_file.read_config(tmp_path)


def read(folder, dtype="float32"):
    network = LanguageModel(config_file.read_config(folder))
    return huggingface.read_params(folder, network, jnp.dtype(dtype), None)


def write(tmp_path, change=None, config=CONFIG, **more):
    """Write the tiny model of `config` after `change` of its tensors: a value of None removes one, others are put in."""
    tensors = tiny.weights(config) | (change or {})
    return tiny.write_checkpoint(tmp_path, config, {k: v for k, v in tensors.items() if v is not None}, **more)


@contextlib.contextmanager
def refused(*words):
    """Expect a ValueError of one sentence that holds all of the words."""
    with pytest.raises(ValueError, match=r".") as caught:
        yield
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert not message.endswith(".")
    assert caught.traceback[-1].frame.f_globals["__name__"].startswith("mlspecqd_jax"), "raised by another package"


def equal(params, expected):
    assert set(params) == set(expected)
    for name, leaf in params.items():
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), np.asarray(expected[name], np.float64), err_msg=name)


# Configs


MINIMAL = {
    "vocab_size": 97,
    "hidden_size": 192,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("family", list(config_file.FAMILIES))
def test_absent_keys_take_the_defaults_of_transformers(tmp_path, family):
    import transformers

    ours = parse(tmp_path, {"model_type": family} | MINIMAL)
    theirs = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[family](**MINIMAL)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
        if hasattr(theirs, key):
            assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10000
    assert ours.rope_scaling == RopeScaling()
    bias = family == "qwen2"
    assert (ours.qkv_bias, ours.output_bias, ours.mlp_bias, ours.qk_norm) == (bias, False, False, family == "qwen3")


def test_defaults_that_are_easily_mistaken(tmp_path):
    """The same facts written out, so that they do not rest on transformers alone."""
    llama = parse(tmp_path, {"model_type": "llama"} | MINIMAL)
    assert (llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings) == (32, 6, 2048)
    mistral = parse(tmp_path, {"model_type": "mistral"} | MINIMAL)
    assert (mistral.num_key_value_heads, mistral.sliding_windows) == (8, (4096,) * 3)
    assert parse(tmp_path, {"model_type": "mistral", "sliding_window": None} | MINIMAL).sliding_windows == ()
    qwen2 = parse(tmp_path, {"model_type": "qwen2", "num_key_value_heads": 4} | MINIMAL)
    assert (qwen2.head_dim, qwen2.max_position_embeddings, qwen2.sliding_windows) == (6, 32768, ())
    assert parse(tmp_path, {"model_type": "qwen3"} | MINIMAL).head_dim == 128


def test_sliding_windows_of_qwen(tmp_path):
    config = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9} | MINIMAL
    assert parse(tmp_path, config | {"max_window_layers": 2}).sliding_windows == (None, None, 9)
    assert parse(tmp_path, config | {"max_window_layers": 3}).sliding_windows == ()
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert parse(tmp_path, config | {"layer_types": kinds}).sliding_windows == (None, 9, None)


def other_spelling(config: dict) -> dict:
    """Turn rope_theta and rope_scaling into rope_parameters, or the other way round."""
    config = dict(config)
    if "rope_parameters" in config:
        scaling = dict(config.pop("rope_parameters"))
        theta = scaling.pop("rope_theta")
        return config | {"rope_theta": theta, "rope_scaling": scaling}
    scaling = config.pop("rope_scaling", {"rope_type": "default"})
    scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    return config | {"rope_parameters": scaling | {"rope_theta": config.pop("rope_theta", 10000.0)}}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_both_spellings_of_rope_are_one(tmp_path, family):
    config = tiny.FAMILIES[family]
    ours = parse(tmp_path, config)
    assert ours == parse(tmp_path, other_spelling(config))
    rope = config.get("rope_parameters") or config
    assert ours.rope_theta == rope.get("rope_theta", 10000.0)


def test_rope_scalings(tmp_path):
    llama3 = tiny.FAMILIES["llama3"]
    expected = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=80)
    assert parse(tmp_path, llama3).rope_scaling == expected
    assert parse(tmp_path, tiny.FAMILIES["llama_linear"]).rope_scaling == RopeScaling("linear", factor=2.5)
    assert parse(tmp_path, llama3 | {"rope_scaling": None}).rope_scaling == RopeScaling()


READ = {
    "HuggingFaceTB--SmolLM2-135M": 134_515_008,
    "Qwen--Qwen2-0.5B": 494_032_768,
    "Qwen--Qwen2.5-1.5B": 1_543_714_304,
    "Qwen--Qwen2.5-7B": 7_615_616_512,
    "Qwen--Qwen3-0.6B": 596_049_920,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "meta-llama--Llama-2-7b-hf": 6_738_415_616,
    "meta-llama--Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama--Meta-Llama-3.1-8B": 8_030_261_248,
    "mistralai--Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
REFUSED = {
    "Qwen--Qwen3-30B-A3B": ("qwen3_moe", "a mixture of experts"),
    "deepseek-ai--DeepSeek-V3": ("deepseek_v3", "multi-head latent attention"),
    "google--gemma-4-26B-A4B": ("gemma4", "a multimodal model"),
    "mistralai--Mixtral-8x7B-v0.1": ("mixtral", "a mixture of experts"),
    "openai--gpt-oss-20b": ("gpt_oss", "a mixture of experts"),
}


def parameters(config) -> int:
    """Count the parameters from the shapes of one layer: those of dozens take their time."""
    shapes = LanguageModel(dataclasses.replace(config, num_hidden_layers=1, sliding_windows=())).shapes()
    sizes = {name: np.prod(shape, dtype=np.int64) for name, shape in shapes.items()}
    layer = sum(size for name, size in sizes.items() if ".layers." in name)
    return sum(sizes.values()) + (config.num_hidden_layers - 1) * layer


def test_configs_of_real_models_are_read_or_refused(shared):
    folders = sorted((shared / "configs").iterdir())
    assert folders
    for folder in folders:
        if folder.name in REFUSED:
            with refused(*REFUSED[folder.name], "supported: llama, mistral"):
                config_file.read_config(folder)
        else:
            assert parameters(config_file.read_config(folder)) == READ[folder.name], folder.name


LLAMA = {"model_type": "llama"} | MINIMAL


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8} | MINIMAL, ("mixtral", "a mixture of experts")),
        ({"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768} | MINIMAL, ("a mixture of experts",)),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256} | MINIMAL, ("multi-head latent attention",)),
        (
            {"model_type": "gpt_oss", "num_local_experts": 32, "rope_scaling": {"rope_type": "yarn"}} | MINIMAL,
            ("gpt_oss", "experts"),
        ),
        ({"model_type": "gemma3", "text_config": {"vocab_size": 9}, "vision_config": {}}, ("gemma3", "a multimodal model")),
        ({"model_type": "bert", "type_vocab_size": 2} | MINIMAL, ("bert", "an encoder")),
        ({"model_type": "t5", "is_encoder_decoder": True, "d_model": 512}, ("t5", "an encoder-decoder")),
        ({"model_type": "gpt2", "n_embd": 768}, ("gpt2", "another architecture", "supported: llama, mistral, qwen2, qwen3")),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "supported: default, linear, llama3")),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ("dynamic", "supported: default, linear, llama3")),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, ("linear", "factor")),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ("llama3", "high_freq_factor")),
        (LLAMA | {"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5", "only 1")),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantized", "gptq", "BF16")),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "CausalLM")),
        (LLAMA | {"hidden_act": "tanh"}, ("hidden_act 'tanh'", "silu")),
        (LLAMA | {"num_key_value_heads": 5}, ("num_key_value_heads 5", "32")),
        (LLAMA | {"hidden_size": "wide"}, ("hidden_size", "wide")),
        (LLAMA | {"head_dim": 7}, ("head_dim", "7", "even")),
        (MINIMAL, ("model_type", "add it")),
        *[
            ({key: value for key, value in LLAMA.items() if key != absent}, (f"'{absent}'", "add it", "config.json"))
            for absent in MINIMAL
        ],
        (
            {"model_type": "qwen3", "num_key_value_heads": 4, "layer_types": ["full_attention"] * 3}
            | MINIMAL
            | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            ("rope_parameters", "layer"),
        ),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, config, words):
    with refused(*words):
        parse(tmp_path, config)


def test_no_config(tmp_path):
    with refused("config.json", "missing", "safetensors"):
        config_file.read_config(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("{", ("not valid JSON",)), ("[1]", ("a list", "JSON object"))])
def test_a_broken_config(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with refused("config.json", "download it again", *words):
        config_file.read_config(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 7]}, "config.json": {"eos_token_id": 2}}, (5, 7)),
        ({"generation_config.json": {"temperature": 0.6}, "config.json": {"eos_token_id": 2}}, (2,)),
        ({"generation_config.json": {"eos_token_id": 0}}, (0,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({}, ()),
    ],
)
def test_ids_that_end_a_text(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert config_file.eos_token_ids(tmp_path, 97) == expected


# Weights


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_in_its_place(tmp_path, shards):
    config = tiny.FAMILIES["qwen3_bias"]
    params = read(write(tmp_path, config=config, shards=shards))
    equal(params, tiny.weights(config))
    assert list(params) == list(LanguageModel(config_file.read_config(tmp_path)).shapes())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
def test_dtypes(tmp_path, stored):
    tensors = {name: value.astype(stored) for name, value in tiny.weights(CONFIG).items()}
    write(tmp_path, tensors)
    for dtype in ("bfloat16", "float32", "float16"):
        equal(read(tmp_path, dtype), {name: value.astype(dtype) for name, value in tensors.items()})


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
    monkeypatch.setattr(huggingface, "_place", lambda *_: pytest.fail("read a tensor of a checkpoint that is refused"))
    with refused("missing tensor model.norm.weight"):
        read(tmp_path)


# Names and the hub


@pytest.mark.parametrize(
    "name", ["no-such-model", "./no/folder", "/no/such/folder", "a/b/c", "owner/", "owner/na me", "https://a/b"]
)
def test_a_name_that_is_neither_folder_nor_id_is_refused_without_network(monkeypatch, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("used the network"))
    with refused(f"'{name}'", "existing folder", "owner/name", "demo"):
        models.find(name)


SERVED = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
EXTRA = {
    "README.md": b"# A model",
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"a second copy of all weights",
    "original/consolidated.00.pth": b"a third one",
    "onnx/model.onnx": b"a fourth one",
    "tf_model.h5": b"a fifth one",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what a snapshot download asks of a hub, and notes the files asked for in `server.requested`."""

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        files = SERVED | EXTRA
        resolve = f"/owner/tiny/resolve/{COMMIT}/"
        if path.startswith("/api/models/owner/gated"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/cut"):
            self.close_connection = True  # no answer at all
        elif path == "/api/models/owner/tiny/revision/main":
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for k, v in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(resolve) and path.removeprefix(resolve) in files:
            name = path.removeprefix(resolve)
            self.server.requested.add(name)
            self.answer(200, files[name], {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


DOWNLOAD = """
import json, sys
from mlspecqd_jax.models import find
found = []
for name in sys.argv[1:]:
    try:
        folder = find(name)
        found.append({file.name: file.read_text() for file in folder.iterdir()})
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_the_hub_is_asked_for_no_more_than_is_needed(tmp_path):
    """One process downloads from a local stand-in, since huggingface_hub reads its settings when it is imported."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requested = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()
    }
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    names = ["owner/tiny", "owner/unknown", "owner/gated", "owner/cut", "owner--two/na..me"]
    try:
        process = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, *names], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
        server.server_close()
    assert process.returncode == 0, process.stderr
    found, unknown, gated, silent, invalid = json.loads(process.stdout)
    assert found == {name: content.decode() for name, content in SERVED.items()}
    assert server.requested == set(SERVED)
    for message, name in [
        (unknown, "owner/unknown"),
        (gated, "owner/gated"),
        (silent, "owner/cut"),
        (invalid, "owner--two/na..me"),
    ]:
        assert name in message
        assert len(message.splitlines()) == 1
    assert "not a public model" in unknown
    assert "gated" in gated
    assert "log in" in gated
    assert "connection" in silent
    assert "could not be downloaded" in invalid


def test_a_file_that_is_no_model_folder(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with refused("model.safetensors", "existing folder"):
        models.find(tmp_path / "model.safetensors")
