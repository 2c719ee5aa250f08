"""Names of models: what is found, what is fetched from a hub, and one sentence for every bad name."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from refusals import refused
from safetensors.numpy import save_file

from mlspecqd_jax.loading import find

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
PARTS = {f"q4/x-{i:05}-of-00002.gguf": f"part {i}".encode() for i in (1, 2)}
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
        files = SERVED | EXTRA | PARTS
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
        place = find(name)
        found.append({file.name: file.read_text() for file in (place if place.is_dir() else place.parent).iterdir()})
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
    names += ["owner/tiny/q4/x-00002-of-00002.gguf", "owner/tiny/y.gguf"]
    try:
        process = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, *names], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
        server.server_close()
    assert process.returncode == 0, process.stderr
    found, unknown, gated, silent, invalid, parts, absent = json.loads(process.stdout)
    assert found == {name: content.decode() for name, content in SERVED.items()}
    assert parts == {name.removeprefix("q4/"): content.decode() for name, content in PARTS.items()}
    assert server.requested == SERVED.keys() | PARTS.keys()
    for message, name in [
        (unknown, "owner/unknown"),
        (gated, "owner/gated"),
        (silent, "owner/cut"),
        (invalid, "owner--two/na..me"),
        (absent, "owner/tiny"),
    ]:
        assert name in message
        assert len(message.splitlines()) == 1
    assert "not a public model" in unknown
    assert "gated" in gated
    assert "log in" in gated
    assert "connection" in silent
    assert "could not be downloaded" in invalid
    assert "has no file 'y.gguf'" in absent


def test_gguf_files(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("used the network"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    assert find.find(path) == find.find(str(path)) == path
    assert find.is_known(str(path))
    monkeypatch.chdir(tmp_path)
    assert find.find("x.gguf") == pathlib.Path("x.gguf")
    for name in ("y.gguf", "./y.gguf", "folder/y.gguf", "../a/b/y.gguf", "owner/.hidden/y.gguf", "owner/name/*.gguf"):
        assert not find.is_known(name)
        with refused(f"'{name}'", ".gguf file", "owner/name/FILE.gguf"):
            find.find(name)
    assert find.is_known("owner/name/y.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert find.find("folder.gguf") == pathlib.Path("folder.gguf")


def test_a_file_that_is_no_model_folder(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with refused("model.safetensors", "existing folder"):
        find.find(tmp_path / "model.safetensors")
