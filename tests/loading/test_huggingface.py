"""Import: which tensors are read, what is fetched from a hub, and one sentence for every bad input."""

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
from refusals import refused
from safetensors.numpy import save_file

from mlspecqd_jax.loading import config_file, find, huggingface
from mlspecqd_jax.network.network import Network
from mlspecqd_jax.weights.tensors import Source

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
        find.find(name)


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
from mlspecqd_jax.loading.find import find
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
        find.find(tmp_path / "model.safetensors")
