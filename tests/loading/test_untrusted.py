"""A folder of a stranger: none of its code runs, nobody is asked whether it may, and nothing outside of it is read."""

import builtins
import io
import json
import os
import pathlib
import pickle
import sys

import folders
import numpy as np
import pytest
import tiny
from refusals import refused
from safetensors.numpy import save_file

import mlspecqd_jax as mlsd
from mlspecqd_jax import cli
from mlspecqd_jax.loading.description import describe

CODE = "import pathlib; pathlib.Path({!r}).touch()\n"


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def planted(tmp_path):
    """A checkpoint with code in every place that a loader might run; whatever runs creates the file `ran`."""
    ran = tmp_path / "ran"
    auto = {
        "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
    }
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    folder = folders.write(tmp_path / "planted", template, tokenizer_class="Tokenizer", auto_map=auto)
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {"auto_map": auto}))
    for name in ("code.py", "tokenizer.py", "__init__.py", "sitecustomize.py", "jinja2.py", "conftest.py"):
        (folder / name).write_text(CODE.format(str(ran)))
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Touch(ran)))
    return folder, ran


def test_nothing_planted_runs_and_nobody_is_asked(planted, monkeypatch):
    folder, ran = planted
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    model = mlsd.load(folder, dtype="float32")
    assert type(model.tokenizer).__module__.startswith("transformers.")
    describe(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in an interactive session
    with refused("the chat template of", "sandbox forbids", "'__init__'"):
        mlsd.prepare(mlsd.stack(model), "Hi", chat=True)
    mlsd.convert(folder, folder.parent / "converted", dtype="float32")
    assert not list((folder.parent / "converted").rglob("*.py"))
    assert not ran.exists()


def test_the_command_asks_nothing_either(planted, monkeypatch, capsys):
    folder, ran = planted
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    command = ["generate", str(folder), "--prompt", "Hi", "--chat", "--draft", "none", "--dtype", "float32"]
    assert cli.main(command) == 2
    told = "".join(capsys.readouterr())
    assert "sandbox" in told
    assert "[y/N]" not in told
    assert not ran.exists()


def test_what_would_run_if_it_were_opened_does_run(planted):
    """So that the absence of the file means something."""
    folder, ran = planted
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert ran.exists()


def test_pickled_weights_alone_are_no_model(planted):
    folder, ran = planted
    (folder / "model.safetensors").unlink()
    with refused("neither model.safetensors nor", "save_pretrained"):
        mlsd.load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with refused("'pytorch_model.bin'", "not a .safetensors file in the folder"):
        mlsd.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("form", ["../outside.safetensors", "sub/../../outside.safetensors", "{}", "..\\outside.safetensors"])
def test_an_index_leads_nowhere_else(tmp_path, monkeypatch, form):
    folder = folders.write(tmp_path / "model", shards=2)
    outside = tmp_path / "outside.safetensors"
    save_file(tiny.weights(folders.CONFIG), outside)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = form.format(outside)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("model.safetensors.index.json", "not a .safetensors file in the folder"):
        mlsd.load(folder)


def test_other_files_that_a_tokenizer_config_names_are_not_read(tmp_path):
    elsewhere = tmp_path / "tokenizer.9.0.json"
    elsewhere.write_text("not a tokenizer")
    named = {"fast_tokenizer_files": [f"../{elsewhere.name}"], "tokenizer_file": str(elsewhere), "vocab_file": str(elsewhere)}
    folder = folders.write(tmp_path / "model", name_or_path="../elsewhere", **named)
    assert mlsd.load(folder).tokenizer.eos_token == "</s>"


def test_a_snapshot_of_links_is_a_folder_like_any_other(tmp_path):
    """As the hub's cache keeps it: every file is a link to where its content lies."""
    blobs = folders.write(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        os.symlink(f"../blobs/{file.name}", tmp_path / "snapshot" / file.name)
    params = mlsd.load(tmp_path / "snapshot", dtype="float32").params
    np.testing.assert_array_equal(params["model.norm.weight"], tiny.weights(folders.CONFIG)["model.norm.weight"])


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_another_form_of_tokenizer_is_refused_by_name(tmp_path, name):
    folder = folders.write(tmp_path / "model", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    (folder / "tokenizer.json").rename(folder / name)
    with refused(name, "tokenizer.json", "save_pretrained"):
        mlsd.load(folder)
    assert describe(folder)["tokenizer"] == f"{name}, which is not read"
